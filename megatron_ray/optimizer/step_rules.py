"""Judges a step's loss and gradient norm by the rules of `training.rules`.

Owns: the numbers that rules compare with, and the verdict. Must not know: what follows
from a verdict, reports.

All of it is on the device, where the numbers are, so that the update of a step that
breaks a rule is left out without the host waiting for them.
"""

import torch
from torch import Tensor

from megatron_ray.config.faults.rules import RuleConfig
from megatron_ray.config.training import TrainingConfig
from megatron_ray.optimizer.step_sums import NUM_FIXED, StepSums, Verdict
from megatron_ray.sharding.sharded_state import ShardedState, whole_tensor

RULES = "optimizer/rules/"
"""Prefix of the names of baselines in checkpoints: [steps counted, numbers ...], fp64."""


class StepRules:
    """The rules of a run, the same on all ranks."""

    def __init__(self, training: TrainingConfig, device: torch.device) -> None:
        self._rules = tuple(_Rule(rule, device) for rule in training.rules)
        self._halted = torch.zeros((), dtype=torch.bool, device=device)
        self.rejected_part = torch.zeros(NUM_FIXED, dtype=torch.float64, device=device)
        """This rank's part of the sums of the step at which the run leaves off."""
        # Down to this scale an overflow of fp16 is none of a rule's business.
        self._min_scale: float | None = None
        scaling = training.scaling
        if scaling is not None and scaling.constant is None:
            self._min_scale = scaling.min_scale

    @torch.no_grad()
    def judge(self, sums: StepSums, part: Tensor, *, is_confirmed: bool = False) -> Verdict:
        """Judges a step and adds its numbers to the baselines.

        `part` is this rank's part of the sums. After a step at which the run leaves off,
        all later ones are left out, until `resume`. `is_confirmed`: the step was computed
        again already, so that a rule with the action `skip` does not halt.
        """
        self.rejected_part = torch.where(self._halted, self.rejected_part, part)
        loss, grad_norm = sums.loss, sums.grad_norm
        lowers_scale = self._lowers_scale(sums)
        open_ = self._halted.logical_not()
        halted = self._halted
        broken = []
        limits = []
        # The first rule that is broken counts.
        for rule in self._rules:
            limit = rule.limit()
            is_broken = rule.is_broken(loss, grad_norm, limit, lowers_scale) & open_
            open_ = open_ & is_broken.logical_not()
            if rule.config.action != "skip" or (rule.config.rerun and not is_confirmed):
                halted = halted | is_broken
            broken.append(is_broken)
            limits.append(limit)
        for rule in self._rules:
            rule.observe(loss, grad_norm, open_)
        self._halted = halted
        return Verdict(
            skip=open_.logical_not().float(),
            halted=halted,
            broken=torch.stack(broken).double(),
            limits=torch.stack(limits),
        )

    def can_break(self, when: str) -> Tensor:
        """Whether the next step can break a rule of this kind, a bool scalar.

        It cannot while such rules have no baseline yet.
        """
        can_break = torch.zeros_like(self._halted)
        for rule in self._rules:
            if rule.config.when == when:
                has_limit = torch.isfinite(rule.limit())
                can_break = can_break | has_limit
        return can_break

    def resume(self) -> None:
        """Ends a halt: the next step is judged by itself."""
        self._halted = torch.zeros_like(self._halted)

    def _lowers_scale(self, sums: StepSums) -> Tensor:
        """Whether the loss is finite and a lower loss scale may cure the gradients."""
        if self._min_scale is None or sums.loss_scale is None:
            return torch.zeros_like(self._halted)
        return torch.isfinite(sums.loss) & (sums.loss_scale > self._min_scale)

    def sharded_state(self) -> ShardedState:
        """Returns live views of the baselines; all ranks have the same."""
        state: ShardedState = {}
        for rule in self._rules:
            if rule.config.has_baseline:
                state[RULES + rule.config.name] = whole_tensor(rule.state)
        return state


class _Rule:
    """One rule with the numbers it compares with."""

    def __init__(self, config: RuleConfig, device: torch.device) -> None:
        self.config = config
        samples = 0
        if config.has_baseline:
            samples = config.samples
        self.state = torch.zeros(1 + samples, dtype=torch.float64, device=device)
        """Steps counted, then their numbers; the next one replaces the oldest."""
        self._places = torch.arange(samples, device=device)

    def limit(self) -> Tensor:
        """Returns the number above which the next step breaks the rule, an fp64 scalar."""
        config = self.config
        if config.limit is not None:
            return torch.full_like(self.state[0], config.limit)
        unlimited = torch.full_like(self.state[0], torch.inf)
        if not config.has_baseline:
            return unlimited
        values = self.state[1:]
        baseline = values.max()
        if config.baseline == "recent_median":
            baseline = values.median()
        is_full = self.state[0] >= config.samples
        return torch.where(is_full, config.factor * baseline, unlimited)

    def is_broken(
        self, loss: Tensor, grad_norm: Tensor, limit: Tensor, lowers_scale: Tensor
    ) -> Tensor:
        """Whether a step with these numbers breaks the rule, a bool scalar."""
        if self.config.when == "not_finite":
            is_finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
            return is_finite.logical_not() & lowers_scale.logical_not()
        value = self._value(loss, grad_norm)
        # Numbers that are not finite are left to their own rule.
        return torch.isfinite(value) & (value > limit)

    def observe(self, loss: Tensor, grad_norm: Tensor, is_good: Tensor) -> None:
        """Adds a step's number to the baseline if the step breaks no rule."""
        if not self.config.has_baseline:
            return
        value = self._value(loss, grad_norm)
        samples = self.config.samples
        count = self.state[0]
        is_added = is_good & torch.isfinite(value)
        if self.config.baseline == "first_max":
            is_added = is_added & (count < samples)
        is_place = (self._places == count.remainder(samples)) & is_added
        # In place, because checkpoints have views of it.
        self.state[1:].copy_(torch.where(is_place, value, self.state[1:]))
        self.state[0].add_(is_added)

    def _value(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        if self.config.when == "loss_spike":
            return loss
        return grad_norm
