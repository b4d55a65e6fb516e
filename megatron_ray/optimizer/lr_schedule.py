"""Computes the learning rate as a pure function of the samples of a schedule.

Owns: warm-up and decay, as Megatron defines them. Torch-free.
"""

from collections.abc import Callable, Mapping
from math import cos, exp2, pi, sqrt

from megatron_ray.config.schedules.lengths import Lengths
from megatron_ray.config.schedules.rates import ScheduleConfig


def learning_rate(
    samples: int, peak: float, schedule: ScheduleConfig, lengths: Lengths
) -> float:
    """Returns the rate of the step that ends with so many samples, its own included.

    `peak` is reached at the end of the warm-up. After the decay it is min_lr.
    """
    if samples <= lengths.warmup:
        climbed = samples / lengths.warmup
        return schedule.init_lr + climbed * (peak - schedule.init_lr)
    if schedule.kind == "constant":
        return peak
    # Megatron's decay counts from the start of the job, not from the warm-up's end.
    if samples > lengths.decay_end or lengths.decay_end <= lengths.warmup:
        return schedule.min_lr
    if schedule.kind == "inverse_sqrt":
        highest = lengths.warmup or lengths.first_step
        return max(schedule.min_lr, peak * sqrt(highest / samples))
    if schedule.kind == "wsd":
        remaining = _wsd(samples, schedule, lengths)
    else:
        ratio = (samples - lengths.warmup) / (lengths.decay_end - lengths.warmup)
        remaining = _SHAPES[schedule.kind](ratio)
    return schedule.min_lr + remaining * (peak - schedule.min_lr)


def _wsd(samples: int, schedule: ScheduleConfig, lengths: Lengths) -> float:
    """Returns the share of the rate that is left after the stable steps."""
    stable = lengths.decay_end - lengths.wsd_decay
    if samples <= stable:
        return 1.0
    return _SHAPES[schedule.wsd_shape]((samples - stable) / lengths.wsd_decay)


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
