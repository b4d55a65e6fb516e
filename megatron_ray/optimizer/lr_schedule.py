"""Computes the learning rate as a pure function of the step.

Owns: warm-up and decay, as Megatron defines them. Torch-free.
"""

from collections.abc import Callable, Mapping
from math import cos, exp2, pi, sqrt

from megatron_ray.config.optimizer import OptimizerConfig, ScheduleConfig


def learning_rate(
    step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig, steps: int
) -> float:
    """Returns the learning rate of update `step` (from 1) in a job of `steps`.

    After the decay it is min_lr.
    """
    peak = optimizer.lr
    if step <= schedule.warmup_steps:
        climbed = step / schedule.warmup_steps
        return schedule.init_lr + climbed * (peak - schedule.init_lr)
    if schedule.kind == "constant":
        return peak
    # Megatron's decay_steps count from the start of the job, not from the warm-up's end.
    decay_steps = schedule.decay_steps or steps
    if step > decay_steps or decay_steps <= schedule.warmup_steps:
        return schedule.min_lr
    if schedule.kind == "inverse_sqrt":
        return max(schedule.min_lr, peak * sqrt(max(schedule.warmup_steps, 1) / step))
    if schedule.kind == "wsd":
        remaining = _wsd(step, schedule, decay_steps)
    else:
        ratio = (step - schedule.warmup_steps) / (decay_steps - schedule.warmup_steps)
        remaining = _SHAPES[schedule.kind](ratio)
    return schedule.min_lr + remaining * (peak - schedule.min_lr)


def _wsd(step: int, schedule: ScheduleConfig, decay_steps: int) -> float:
    """Returns the share of the rate that is left after the stable steps."""
    length = schedule.wsd_length(decay_steps)
    stable_steps = decay_steps - length
    if step <= stable_steps:
        return 1.0
    return _SHAPES[schedule.wsd_shape]((step - stable_steps) / length)


def _linear(ratio: float) -> float:
    return 1 - ratio


def _cosine(ratio: float) -> float:
    return (cos(pi * ratio) + 1) / 2


def _exponential(ratio: float) -> float:
    # 2 x 0.5^q - 1.
    return exp2(1 - ratio) - 1


def _minus_sqrt(ratio: float) -> float:
    return 1 - sqrt(ratio)


_SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
    "minus_sqrt": _minus_sqrt,
}
"""What is left of the rate after a share of the decay."""
