"""Checks the learning rate over the steps of a run.

Owns: which numbers of `schedule` leave steps that train nothing. Pure. Must not know: how
many ranks there are.
"""

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig

_MAX_IDLE_SHARE = 0.1
"""Largest share of a run's steps whose rate may be 0."""
_SMALLEST_RATE = 1e-10
"""An Adam update of this size is lost when it is added to an fp32 weight of 0.01."""


def schedule_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of the decay: upwards, before the warm-up ends, or to 0 too soon."""
    schedule = config.schedule
    lr = config.optimizer.lr
    if schedule.min_lr > lr:
        detail = f"min_lr={schedule.min_lr:g} is above optimizer.lr={lr:g}; lower it"
        return [Problem("/schedule/min_lr", "min_lr", detail)]
    if schedule.init_lr > lr:
        detail = f"init_lr={schedule.init_lr:g} is above optimizer.lr={lr:g}; lower it"
        return [Problem("/schedule/init_lr", "init_lr", detail)]
    if schedule.kind == "constant":
        return []
    if schedule.kind == "wsd":
        problems = _wsd_problems(config)
        if problems:
            return problems
    if schedule.decay_steps is None:
        return []
    if schedule.decay_steps <= schedule.warmup_steps:
        detail = (
            f"decay_steps={schedule.decay_steps} is not after "
            f"warmup_steps={schedule.warmup_steps}, so the rate would drop from "
            f"optimizer.lr={lr:g} to min_lr={schedule.min_lr:g} at once; decay_steps counts "
            "from step 0 with the warm-up included: leave it out to decay until the last step"
        )
        return [Problem("/schedule/decay_steps", "decay_after_warmup", detail)]
    return _idle_problems(config)


def _wsd_problems(config: TrainConfig) -> list[Problem]:
    """Returns a problem of a decay that would begin within the warm-up."""
    schedule = config.schedule
    decay_steps = schedule.decay_steps or config.training.known_steps
    if decay_steps is None:
        return []
    length = schedule.wsd_length(decay_steps)
    most = decay_steps - schedule.warmup_steps
    # A warm-up that is too long has a message of its own.
    if length <= most or most < 1:
        return []
    detail = (
        f"wsd_decay_steps={length} is more than the {most} steps between "
        f"warmup_steps={schedule.warmup_steps} and the end of the decay in step {decay_steps}; "
        f"make it at most {most}"
    )
    return [Problem("/schedule/wsd_decay_steps", "wsd_decay_steps", detail)]


def _idle_problems(config: TrainConfig) -> list[Problem]:
    steps = config.training.known_steps
    decay_steps = config.schedule.decay_steps
    if decay_steps is None or steps is None:
        return []
    idle = idle_steps(config)
    # At the end of every decay to 0 one step has a rate of 0.
    if idle <= max(1, _MAX_IDLE_SHARE * steps):
        return []
    lowest = f"{config.schedule.min_lr:g}"
    detail = (
        f"decay_steps={decay_steps} with min_lr={lowest} leaves a rate of {lowest} for {idle} "
        f"of training.steps={steps}; set min_lr above {lowest}, leave decay_steps out, or "
        f"lower steps to {decay_steps}"
    )
    return [Problem("/schedule/decay_steps", "rate_of_zero", detail)]


def idle_steps(config: TrainConfig) -> int:
    """Returns the number of steps whose learning rate is 0, or too small to count."""
    schedule = config.schedule
    steps = config.training.num_steps
    decay_steps = schedule.decay_steps or steps
    if schedule.kind == "constant" or schedule.min_lr >= _SMALLEST_RATE:
        return 0
    # Step `decay_steps` is the first one at min_lr, unless the warm-up includes it.
    first = max(decay_steps, schedule.warmup_steps + 1)
    if schedule.kind == "inverse_sqrt":
        # It does not come down to min_lr by itself.
        first += 1
    return max(0, steps - first + 1)


def schedule_warnings(config: TrainConfig) -> list[Problem]:
    """Returns numbers of the learning rate that have little or no effect."""
    schedule = config.schedule
    steps = config.training.num_steps
    lr = config.optimizer.lr
    warnings = list[Problem]()
    if lr < _SMALLEST_RATE:
        detail = f"lr={lr:g} is too small to change fp32 weights; raise it"
        warnings.append(Problem("/optimizer/lr", "rate_too_small", detail))
    if schedule.warmup_steps >= steps:
        highest = lr * steps / schedule.warmup_steps
        detail = (
            f"warmup_steps={schedule.warmup_steps} is not shorter than training.steps={steps}: "
            f"the rate only climbs, to {highest:g} in the last step (optimizer.lr={lr:g})"
        )
        warnings.append(Problem("/schedule/warmup_steps", "warmup_too_long", detail))
    warnings += _unused_warnings(config)
    if schedule.kind == "constant":
        return warnings + _constant_warnings(config)
    if schedule.min_lr == lr:
        detail = f"min_lr={lr:g} equals optimizer.lr, so the rate does not decay"
        warnings.append(Problem("/schedule/min_lr", "no_effect", detail))
    decay_steps = schedule.decay_steps or steps
    if decay_steps > steps:
        detail = (
            f"decay_steps={decay_steps} is beyond training.steps={steps}: the rate does not "
            f"come down to min_lr={schedule.min_lr:g}"
        )
        warnings.append(Problem("/schedule/decay_steps", "decay_too_long", detail))
    idle = idle_steps(config)
    if idle > 1 or idle == steps:
        detail = (
            f"the rate is {schedule.min_lr:g} in {idle} of {steps} steps, since the decay ends "
            f"at min_lr={schedule.min_lr:g} in step {decay_steps}; a higher min_lr trains in "
            "them too"
        )
        warnings.append(Problem("/schedule/min_lr", "rate_of_zero", detail))
    return warnings


def _unused_warnings(config: TrainConfig) -> list[Problem]:
    """Returns fields that this kind of schedule does not use."""
    schedule = config.schedule
    warnings = []
    if schedule.init_lr > 0 and schedule.warmup_steps == 0:
        detail = f"init_lr={schedule.init_lr:g} has no effect without warmup_steps"
        warnings.append(Problem("/schedule/init_lr", "no_effect", detail))
    if schedule.kind != "wsd":
        for name in ("wsd_decay_steps", "wsd_shape"):
            value = getattr(schedule, name)
            if value != type(schedule).model_fields[name].default:
                detail = f"{name}={value} has no effect with kind={schedule.kind}"
                warnings.append(Problem(f"/schedule/{name}", "no_effect", detail))
    return warnings


def _constant_warnings(config: TrainConfig) -> list[Problem]:
    warnings = []
    schedule = config.schedule
    for name, value in (
        ("min_lr", schedule.min_lr),
        ("decay_steps", schedule.decay_steps),
    ):
        if value:
            detail = (
                f"{name}={value:g} has no effect with kind=constant, which does not decay"
            )
            warnings.append(Problem(f"/schedule/{name}", "no_effect", detail))
    return warnings
