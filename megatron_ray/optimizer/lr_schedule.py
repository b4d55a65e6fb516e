"""Computes the learning rate as a pure function of the step.

Owns: warm-up and decay, as Megatron defines them. Torch-free.
"""

from math import cos, pi

from megatron_ray.config.optimizer import OptimizerConfig, ScheduleConfig


def learning_rate(
    step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig, steps: int
) -> float:
    """Returns the learning rate of update `step` (from 1) in a job of `steps`.

    After the decay it is min_lr.
    """
    peak = optimizer.lr
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    # Megatron's decay_steps count from the start of the job, not from the warm-up's end.
    decay_steps = schedule.decay_steps or steps
    if step > decay_steps or decay_steps <= schedule.warmup_steps:
        return schedule.min_lr
    ratio = (step - schedule.warmup_steps) / (decay_steps - schedule.warmup_steps)
    if schedule.kind == "linear":
        remaining = 1 - ratio
    else:
        remaining = (cos(pi * ratio) + 1) / 2
    return schedule.min_lr + remaining * (peak - schedule.min_lr)
