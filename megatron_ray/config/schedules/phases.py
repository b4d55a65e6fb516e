"""Divides a run into phases with one schedule and one set of numbers each.

Owns: what holds from which step on. Pure. Must not know: the shape of a rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.config.schedules.lengths import Clock, Lengths, lengths_of
from megatron_ray.config.schedules.rates import ScheduleConfig


@dataclass(frozen=True)
class Phase:
    """Steps between two switches, the borders of a run included."""

    first_step: int
    last_step: int
    schedule: ScheduleConfig
    pointer: str
    """JSON pointer of the schedule."""
    clock: Clock
    """Counts from the schedule's first step, which may be before the phase."""
    peak_lr: float
    peak_name: str = "optimizer.lr"
    """Name of the field that sets it."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the optimizer that switches have set."""

    @property
    def lengths(self) -> Lengths:
        """Lengths of the schedule."""
        return lengths_of(self.schedule, self.clock)


def phases_of(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, clock: Clock
) -> tuple[Phase, ...]:
    """Returns the phases of a run in their order; those beyond its last step are none.

    `clock` counts the steps of the whole run.
    """
    last_step = clock.last_step
    phase = Phase(1, last_step, schedule, "/schedule", clock, optimizer.lr)
    phases = []
    for index, switch in enumerate(optimizer.switches):
        if switch.step > last_step:
            break
        phases.append(replace(phase, last_step=switch.step - 1))
        numbers = {**phase.numbers, **switch.numbers}
        peak_lr = numbers.pop("lr", phase.peak_lr)
        phase = replace(phase, first_step=switch.step, peak_lr=peak_lr, numbers=numbers)
        if switch.lr is not None:
            phase = replace(phase, peak_name=f"optimizer.switches.{index}.lr")
        if switch.schedule is not None:
            pointer = f"/optimizer/switches/{index}/schedule"
            begin = replace(clock, steps_before=switch.step - 1)
            phase = replace(phase, schedule=switch.schedule, pointer=pointer, clock=begin)
    return (*phases, phase)
