"""Learning rate as a pure function of the step.

Owns: warm-up and decay, as Megatron defines them. Torch-free.
"""

from math import cos, pi

from megatron_ray.config.optimizer import OptimizerConfig, ScheduleConfig


def learning_rate(
    step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig, steps: int
) -> float:
    """Rate of update number `step` (from 1) in a job of `steps`; after the decay it
    stays at min_lr.
    """
    peak = optimizer.lr
    low = schedule.min_lr
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    decay_steps = schedule.decay_steps or steps
    if step > decay_steps or decay_steps <= schedule.warmup_steps:
        return low
    ratio = (step - schedule.warmup_steps) / (decay_steps - schedule.warmup_steps)
    share = 1 - ratio if schedule.kind == "linear" else (cos(pi * ratio) + 1) / 2
    return low + share * (peak - low)
