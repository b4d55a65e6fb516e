"""Injects the faults of `training.inject_faults` into a rank's part of a step's numbers.

Owns: which faults strike a step, and what they make of its numbers. Must not know: what
follows from a verdict, reports.

As with Megatron's error injector, only the result that is validated changes. A step that
breaks a rule never changes the weights, so a rehearsal leaves the same weights as a run
whose rules act on real faults.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ray.config.faults.injection import FaultConfig
from megatron_ray.config.training import TrainingConfig
from megatron_ray.optimizer.step_rules import StepRules
from megatron_ray.training.rules.checks import StepChecks

STRUCK = 1e30
"""Loss, or gradient norm, of each token of the struck rank: above every limit, and with a
square that fp64 holds."""


@dataclass(frozen=True)
class Judging:
    """How the run's rules judge one step."""

    is_confirmed: bool = False
    """As in `StepRules.judge`."""
    faults: Sequence[FaultConfig] = ()
    """Faults that strike this rank's part of the step's numbers."""


PLAIN_JUDGING = Judging()
"""That of a step computed for the first time, without faults."""


class FaultInjector:
    """Chooses the faults that strike a rank's steps."""

    def __init__(self, training: TrainingConfig, rank: int) -> None:
        self._faults = [fault for fault in training.inject_faults if fault.rank == rank]
        self._left_out = training.skip_steps

    def judging(self, step: int, checks: StepChecks) -> Judging:
        """Returns how a step is judged, as it is computed now."""
        return Judging(checks.is_confirmed(step), self._at(step, checks))

    def _at(self, step: int, checks: StepChecks) -> Sequence[FaultConfig]:
        if not self._faults or step in self._left_out:
            return ()
        ended = set()
        if checks.is_rerun(step):
            ended.add("transient")
        if checks.has_moved:
            ended |= {"transient", "persistent"}
        due = [fault for fault in self._faults if fault.is_due(step)]
        return [fault for fault in due if fault.kind not in ended]


def strike_(
    values: Tensor, faults: Sequence[FaultConfig], num_tokens: int, rules: StepRules | None
) -> None:
    """Changes this rank's part of the step's numbers in place, on the device.

    `values` are in the order of `StepSums`; `num_tokens` are those of this rank's batches.
    A rule that has no baseline yet would not notice a fault, which is left out then.
    """
    if not faults or rules is None:
        return
    tokens = max(num_tokens, 1)
    for fault in faults:
        if fault.breaks == "not_finite":
            values[0].fill_(torch.nan)
            continue
        index = 0
        excess = STRUCK * tokens
        if fault.breaks == "large_grad_norm":
            index = 2
            excess = excess**2
        values[index] += rules.can_break(fault.breaks).double() * excess
