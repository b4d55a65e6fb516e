"""Updates flat memory in place by the optimizer's rule.

Owns: which kernel does it, the count of updates, steps that are skipped. Must not know:
buckets, ranks, the model.

AdamW uses torch's fused kernel; its functional form, because the class would import the
compiler, which takes a second. Other rules are elementwise functions.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.config.optimizer_kinds import optimizer_kind
from megatron_ray.optimizer.rules.adam import adamw as adamw_rule
from megatron_ray.optimizer.rules.elements import Elements, Rates, Rule
from megatron_ray.optimizer.update_rule import UpdateRule

_CHUNK = 1 << 24
"""Elements that an elementwise rule updates at once, which bounds its temporaries."""


@dataclass(frozen=True)
class RunTensors:
    """Views of one run in flat memory, all of one shape."""

    weights: Tensor
    """fp32 main parameters."""
    gradient: Tensor
    state: Mapping[str, Tensor]

    @contextmanager
    def opened(self) -> Iterator["RunTensors"]:
        """Gives the views themselves."""
        yield self


class UpdatedRun(Protocol):
    """A run that is updated in place: `RunTensors`, or what is not kept in such views."""

    def opened(self) -> AbstractContextManager[RunTensors]:
        """Gives the run's tensors; they are kept as they are at the end."""


class UpdateCall(Protocol):
    """Updates some elements of flat memory."""

    def step(self, lr: float, skip: Tensor | None) -> None:
        """Updates with the current gradients, unless the scalar `skip` is 1.

        `lr` is that of the schedule.
        """

    def set_steps_taken(self, steps: int) -> None:
        """Sets the number of previous updates."""

    def set_numbers(self, peak_lr: float, numbers: Mapping[str, float]) -> None:
        """Sets numbers that replace those of the rule from the next update on."""


class RunUpdate(UpdateCall, Protocol):
    """Updates all runs that share a rule."""

    def add(self, run: UpdatedRun) -> None:
        """Adds a run."""


def update_call(
    config: OptimizerConfig, rule: UpdateRule, device: torch.device
) -> RunUpdate:
    """Returns what updates runs by a rule."""
    module, _, function = optimizer_kind(config.name).rule.partition(":")
    elementwise: Rule = getattr(import_module(module), function)
    is_plain = config.nu is None and config.aggregated is None
    is_plain = is_plain and config.exp_avg_dtype == config.exp_avg_sq_dtype == "fp32"
    if elementwise is adamw_rule and is_plain and rule.decay != "l2":
        return FusedAdamW(rule, config.lr, device)
    return ElementwiseUpdate(elementwise, rule, config.lr, device)


def decay_of(rule: UpdateRule, lr: float, peak_lr: float) -> float:
    """Returns the share of a weight that one update subtracts, see `OptimizerConfig.decay`."""
    if rule.decay == "l2":
        return 0.0
    if rule.decay == "schedule":
        return lr / peak_lr * rule.weight_decay
    return lr * rule.lr_scale * rule.weight_decay


class FusedAdamW:
    """AdamW by torch's fused kernel."""

    def __init__(self, rule: UpdateRule, peak_lr: float, device: torch.device) -> None:
        self._spec_rule = rule
        self._rule = rule
        self._peak_lr = peak_lr
        self._device = device
        self._runs: list[UpdatedRun] = []
        # On the device, where the kernel reads them without synchronization.
        self._counts: list[Tensor] = []

    def add(self, run: UpdatedRun) -> None:
        """Adds a run."""
        self._runs.append(run)
        self._counts.append(torch.zeros((), device=self._device))

    def step(self, lr: float, skip: Tensor | None) -> None:
        """Updates with the current gradients, unless the scalar `skip` is 1."""
        with ExitStack() as stack:
            runs = [stack.enter_context(run.opened()) for run in self._runs]
            self._update(runs, lr, skip)

    def _update(self, runs: Sequence[RunTensors], lr: float, skip: Tensor | None) -> None:
        """Updates all runs by one call."""
        rule = self._rule
        weights = [run.weights for run in runs]
        weight_decay = rule.weight_decay
        if rule.decay == "schedule" and weight_decay > 0:
            _decay(weights, decay_of(rule, lr, self._peak_lr), skip)
            weight_decay = 0.0
        adamw(
            weights,
            [run.gradient for run in runs],
            [run.state["exp_avg"] for run in runs],
            [run.state["exp_avg_sq"] for run in runs],
            max_exp_avg_sqs=[],
            state_steps=self._counts,
            fused=True,
            amsgrad=False,
            beta1=rule.beta1,
            beta2=rule.beta2,
            lr=lr * rule.lr_scale,
            weight_decay=weight_decay,
            eps=rule.eps,
            maximize=False,
            # The kernel changes nothing when it is 1, update counts included.
            found_inf=skip,
        )

    def set_steps_taken(self, steps: int) -> None:
        """Sets the number of previous updates."""
        for count in self._counts:
            count.fill_(float(steps))

    def set_numbers(self, peak_lr: float, numbers: Mapping[str, float]) -> None:
        """Sets numbers that replace those of the rule from the next update on."""
        self._rule = self._spec_rule.with_numbers(numbers)
        self._peak_lr = peak_lr


def _decay(weights: list[Tensor], decay: float, skip: Tensor | None) -> None:
    if skip is None:
        torch._foreach_mul_(weights, 1 - decay)
    else:
        torch._foreach_mul_(weights, 1 - decay * (1 - skip))


class ElementwiseUpdate:
    """An update by an elementwise function."""

    def __init__(
        self, function: Rule, rule: UpdateRule, peak_lr: float, device: torch.device
    ) -> None:
        self._function = function
        self._spec_rule = rule
        self._rule = rule
        self._peak_lr = peak_lr
        self._runs: list[UpdatedRun] = []
        # On the device: a skipped step must not count, and the host does not know of it.
        # fp64, since 1 - 0.9999**1 has three digits in fp32.
        self._count = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, run: UpdatedRun) -> None:
        """Adds a run."""
        self._runs.append(run)

    def step(self, lr: float, skip: Tensor | None) -> None:
        """Updates with the current gradients, unless the scalar `skip` is 1."""
        if skip is None:
            self._count += 1
        else:
            self._count += 1 - skip
        rule = self._rule
        rates = Rates(lr * rule.lr_scale, decay_of(rule, lr, self._peak_lr), self._count)
        for run in self._runs:
            with run.opened() as tensors:
                for start in range(0, tensors.weights.numel(), _CHUNK):
                    self._update(tensors, slice(start, start + _CHUNK), rates, skip)

    def _update(
        self, run: RunTensors, chunk: slice, rates: Rates, skip: Tensor | None
    ) -> None:
        rule = self._rule
        state = {name: flat[chunk] for name, flat in run.state.items()}
        wide = {name: widened(values) for name, values in state.items()}
        old = Elements(run.weights[chunk], wide)
        gradient = run.gradient[chunk]
        if rule.decay == "l2" and rule.weight_decay > 0:
            gradient = gradient + rule.weight_decay * old.weights
        new = self._function(old, gradient, rule, rates)
        replace_unless(skip, old.weights, new.weights)
        for name, values in new.state.items():
            replace_unless(skip, state[name], values)

    def set_steps_taken(self, steps: int) -> None:
        """Sets the number of previous updates."""
        self._count.fill_(float(steps))

    def set_numbers(self, peak_lr: float, numbers: Mapping[str, float]) -> None:
        """Sets numbers that replace those of the rule from the next update on."""
        self._rule = self._spec_rule.with_numbers(numbers)
        self._peak_lr = peak_lr


def widened(state: Tensor) -> Tensor:
    """Returns state of a shorter type in fp32."""
    return state.to(torch.promote_types(state.dtype, torch.float32))


def replace_unless(skip: Tensor | None, old: Tensor, new: Tensor) -> None:
    """Writes new values over old ones, unless `skip` is 1."""
    if skip is not None:
        # Chosen, not multiplied: what is skipped may be NaN.
        new = torch.where(skip == 1, old, new)
    old.copy_(new)
