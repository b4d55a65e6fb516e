"""Computes the numbers with which a step updates the model.

Owns: what changes from step to step: the learning rate, weight decay, what switches set.
Pure functions of the step, so that a resumed run goes on exactly. Torch-free.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi

from megatron_ray.config.optimizer import WeightDecayScheduleConfig
from megatron_ray.config.schedules.phases import phases_of
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.optimizer.lr_schedule import learning_rate


@dataclass(frozen=True)
class StepRates:
    """The numbers of one step."""

    lr: float
    clip_grad_norm: float
    peak_lr: float
    """The rate of which the schedule is a share."""
    numbers: Mapping[str, float]
    """Numbers of the optimizer that differ from those of its config."""
    weight_decay: float | None = None
    """Weight decay of parameters without one of their own; None where every step has the
    same."""


class RunRates:
    """The numbers of all steps of a run, whose length must be known."""

    def __init__(self, config: TrainConfig) -> None:
        self._optimizer = config.optimizer
        self._clock = config.training.clock(config.training.num_steps)
        phases = phases_of(config.optimizer, config.schedule, self._clock)
        self._phases = [(phase, phase.lengths) for phase in phases]
        self._num_samples = self._clock.num_samples
        self.varies = bool(config.optimizer.varying_numbers)
        """Whether numbers other than the learning rate change."""

    def at(self, step: int) -> StepRates:
        """Returns the numbers of a step, from 1."""
        # Runs have one phase, or a few.
        phase, lengths = self._phases[0]
        for later in self._phases:
            if later[0].first_step > step:
                break
            phase, lengths = later
        samples = phase.clock.samples(step - phase.clock.steps_before)
        lr = learning_rate(samples, phase.peak_lr, phase.schedule, lengths)
        numbers = dict(phase.numbers)
        clip_grad_norm = numbers.pop("clip_grad_norm", self._optimizer.clip_grad_norm)
        schedule = self._optimizer.weight_decay_schedule
        if schedule is not None:
            share = self._clock.samples(step) / self._num_samples
            start = self._optimizer.weight_decay
            numbers["weight_decay"] = weight_decay(share, start, schedule)
        decay: float | None = None
        if "weight_decay" in self._optimizer.varying_numbers:
            decay = numbers.get("weight_decay", self._optimizer.weight_decay)
        return StepRates(lr, clip_grad_norm, phase.peak_lr, numbers, decay)


def weight_decay(share: float, start: float, schedule: WeightDecayScheduleConfig) -> float:
    """Returns the weight decay after a share of the run's samples, as Megatron does."""
    if share >= 1:
        return schedule.end
    if schedule.kind == "cosine":
        share = (cos(pi * (1 - share)) + 1) / 2
    return start + share * (schedule.end - start)
