"""Scales the losses of fp16, whose gradients would underflow otherwise.

Owns: the scale and what changes it. Must not know: the model, gradients, when a step is
skipped.

A dynamic scale is lowered when gradients overflow and raised after a number of steps
without (Micikevicius et al. 2018); the rule is Megatron-LM's. All numbers are on the
device, where the overflow is known, so that the host never waits for them.
"""

from math import log2

import torch
from torch import Tensor

from megatron_ray.config.training import TrainingConfig
from megatron_ray.sharding.sharded_state import ShardedState, whole_tensor

LOSS_SCALE = "optimizer/loss_scale"
"""Name of the dynamic scale's state in checkpoints: [scale, steps without overflow since
the last change, overflows left until it is lowered], fp64."""


class LossScaler:
    """The loss scale of a run, the same on all ranks."""

    def __init__(self, training: TrainingConfig, device: torch.device) -> None:
        """Starts at the scale of `training.scaling`, which must not be None."""
        assert training.scaling is not None
        self._config = training.scaling
        self._state = torch.tensor(
            [self._config.first_scale, 0.0, self._config.hysteresis],
            dtype=torch.float64,
            device=device,
        )
        # The scale is that of a step's mean loss, and gradients are those of sums over
        # tokens. A power of two, by which a division rounds nothing.
        num_tokens = training.global_batch_size * training.seq_length
        self._tokens = 2.0 ** int(log2(num_tokens))

    @property
    def scale(self) -> Tensor:
        """A copy of the scale, an fp64 scalar on the device."""
        return self._state[0].clone()

    def grad_factor(self, scale: Tensor) -> Tensor:
        """Returns by what a scale multiplies the gradients of sums over tokens."""
        return scale / self._tokens

    def factor(self) -> Tensor:
        """Returns the factor of the current step's gradients, an fp32 scalar."""
        return self.grad_factor(self._state[0]).float()

    @torch.no_grad()
    def update(self, overflow: Tensor, halted: Tensor | None = None) -> None:
        """Adapts a dynamic scale after a step.

        The scalar `overflow` is 1 if the step's loss or gradients were not finite. Where
        `halted` is true, the step will be computed again, and changes nothing.
        """
        config = self._config
        if config.constant is not None:
            return
        scale, good_steps, overflows_left = self._state.unbind()
        is_overflow = overflow == 1
        good_steps = torch.where(is_overflow, 0.0, good_steps + 1)
        # Only a raise refills it, as in Megatron-LM: a good step does not.
        overflows_left = (overflows_left - is_overflow.double()).clamp(min=0)
        is_lowered = is_overflow & (overflows_left == 0)
        is_raised = good_steps == config.growth_interval
        lower = (scale * config.backoff_factor).clamp(min=config.min_scale)
        scale = torch.where(is_lowered, lower, scale)
        scale = torch.where(is_raised, scale * config.growth_factor, scale)
        good_steps = torch.where(is_raised, 0.0, good_steps)
        overflows_left = torch.where(is_raised, float(config.hysteresis), overflows_left)
        new = torch.stack([scale, good_steps, overflows_left])
        if halted is not None:
            new = torch.where(halted, self._state, new)
        # In place, because checkpoints have views of it.
        self._state.copy_(new)

    def sharded_state(self) -> ShardedState:
        """Returns a live view of a dynamic scale's state; all ranks have the same."""
        if self._config.constant is not None:
            return {}
        return {LOSS_SCALE: whole_tensor(self._state)}
