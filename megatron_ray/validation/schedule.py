"""Checks the learning rate over the steps of a run.

Owns: which numbers of schedules leave steps that train nothing. Pure. Must not know: how
many ranks there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ray.config.problem import Problem
from megatron_ray.config.schedules.lengths import Clock, Lengths
from megatron_ray.config.schedules.phases import Phase, phases_of
from megatron_ray.config.schedules.rates import PARTS, UNITS, ScheduleConfig
from megatron_ray.config.train_config import TrainConfig

_MAX_IDLE_SHARE = 0.1
"""Largest share of a run's steps whose rate may be 0."""
_SMALLEST_RATE = 1e-10
"""An Adam update of this size is lost when it is added to an fp32 weight of 0.01."""
_UNKNOWN_STEPS = 1 << 41
"""Stands for the steps of a number of epochs; more than any length in a spec."""


@dataclass(frozen=True)
class _Span:
    """The steps of one schedule, over all phases in which it holds."""

    phases: tuple[Phase, ...]
    steps: int
    """Steps of the run."""

    @property
    def schedule(self) -> ScheduleConfig:
        return self.phases[0].schedule

    @property
    def clock(self) -> Clock:
        return self.phases[0].clock

    @property
    def lengths(self) -> Lengths:
        return self.phases[0].lengths

    @property
    def last_step(self) -> int:
        return self.phases[-1].last_step

    @property
    def num_steps(self) -> int:
        return self.last_step - self.clock.steps_before

    @property
    def decay_step(self) -> int:
        """The step of the run in which the decay ends."""
        return self.clock.steps_before + self.clock.steps_until(self.lengths.decay_end)

    @property
    def end(self) -> str:
        """The last step, in words."""
        if self.last_step == self.steps:
            if self.clock.steps_before:
                return f"the {self.num_steps} steps from the switch on"
            return f"training.steps={self.steps}"
        return f"the {self.num_steps} steps until the switch in step {self.last_step + 1}"

    def field(self, part: str) -> str:
        """Returns the field that gives the length of a part, with its value."""
        name = self.name(part)
        return f"{name}={_shown(getattr(self.schedule, name))}"

    def name(self, part: str) -> str:
        """Returns the name of that field, that of the steps by default."""
        return (*self.schedule.length_fields(part), f"{part}_steps")[0]

    def problem(self, field: str, code: str, detail: str) -> Problem:
        """Returns a problem of a field of the schedule."""
        return Problem(f"{self.phases[0].pointer}/{field}", code, detail)


def _spans(config: TrainConfig, steps: int) -> list[_Span]:
    phases = phases_of(config.optimizer, config.schedule, config.training.clock(steps))
    by_schedule: dict[str, tuple[Phase, ...]] = {}
    for phase in phases:
        by_schedule[phase.pointer] = (*by_schedule.get(phase.pointer, ()), phase)
    return [_Span(of_schedule, steps) for of_schedule in by_schedule.values()]


def _shown(value: float) -> str:
    """Returns a number with all digits of a whole one."""
    if isinstance(value, int):
        return str(value)
    return f"{value:g}"


def schedule_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of schedules.

    Those are a length in two units, a rate above its peak, a decay before the warm-up
    ends, and one to 0 too soon.
    """
    steps = config.training.known_steps
    problems = []
    spans = _spans(config, steps or _UNKNOWN_STEPS)
    for span in spans:
        problems += _unit_problems(span) or _span_problems(span, is_known=steps is not None)
    if problems or steps is None:
        return problems
    return _idle_problems(spans)


def _unit_problems(span: _Span) -> list[Problem]:
    """Returns a problem for each length that is given more than once."""
    problems = []
    for part in PARTS:
        fields = span.schedule.length_fields(part)
        if len(fields) > 1:
            detail = (
                f"only one of {', '.join(fields)} may be given; leave out "
                f"{' and '.join(fields[1:])}"
            )
            problems.append(span.problem(fields[1], "one_unit", detail))
    return problems


def _span_problems(span: _Span, *, is_known: bool) -> list[Problem]:
    schedule = span.schedule
    for phase in span.phases:
        names = ["min_lr"]
        if phase is span.phases[0]:
            names.append("init_lr")
        for name in names:
            rate = getattr(schedule, name)
            if rate > phase.peak_lr:
                detail = f"{name}={rate:g} is above {phase.peak_name}={phase.peak_lr:g}; lower it"
                return [span.problem(name, name, detail)]
    if schedule.kind == "constant":
        return []
    # Shares of a number of epochs are known with it.
    if not is_known and schedule.has_shares:
        return []
    if schedule.kind == "wsd":
        problems = _wsd_problems(span, is_known=is_known)
        if problems:
            return problems
    return _order_problems(span)


def _order_problems(span: _Span) -> list[Problem]:
    """Returns a problem of a decay that ends before the warm-up."""
    lengths = span.lengths
    if not span.schedule.length_fields("decay") or lengths.decay_end > lengths.warmup:
        return []
    phase = span.phases[0]
    start = "step 0"
    if span.clock.steps_before:
        start = "the switch"
    detail = (
        f"{span.field('decay')} is not after {span.field('warmup')}, so the rate would drop "
        f"from {phase.peak_name}={phase.peak_lr:g} to min_lr={span.schedule.min_lr:g} at "
        f"once; {span.name('decay')} counts from {start} with the warm-up included: leave "
        "it out to decay until the last step"
    )
    return [span.problem(span.name("decay"), "decay_after_warmup", detail)]


def _wsd_problems(span: _Span, *, is_known: bool) -> list[Problem]:
    """Returns a problem of a decay that would begin within the warm-up."""
    lengths = span.lengths
    if not is_known and not span.schedule.length_fields("decay"):
        return []
    most = lengths.decay_end - lengths.warmup
    # A warm-up that is too long has a message of its own.
    if lengths.wsd_decay <= most or most < 1:
        return []
    name = span.name("wsd_decay")
    length, allowed, unit = _in_unit(span, name, most)
    start = "the start"
    if lengths.warmup:
        start = span.field("warmup")
    detail = (
        f"{name}={_shown(length)} is more than the {_shown(allowed)} {unit} between {start} "
        f"and the end of the decay in step {span.decay_step}; make it at most "
        f"{_shown(allowed)}"
    )
    return [span.problem(name, "wsd_decay_steps", detail)]


def _in_unit(span: _Span, name: str, most: int) -> tuple[float, float, str]:
    """Returns the length in a field, at most `most` samples in its unit, and the unit."""
    clock = span.clock
    value = getattr(span.schedule, name)
    if name.endswith("_tokens"):
        return value, most * clock.seq_length, "tokens"
    if name.endswith("_fraction"):
        return value, most / clock.num_samples, "of the run"
    if name.endswith("_samples"):
        return value, most, "samples"
    first = clock.steps_within(span.lengths.decay_end - most)
    last = clock.steps_until(span.lengths.decay_end)
    if value is None:
        value = -(-last // 10)
    return value, last - max(first, 0), "steps"


def _idle_problems(spans: Sequence[_Span]) -> list[Problem]:
    """Returns a problem when too many steps have a rate of 0."""
    steps = spans[0].steps
    idle = sum(_idle_steps(span) for span in spans)
    worst = max(spans, key=_idle_steps)
    # At the end of every decay to 0 one step has a rate of 0.
    if idle <= max(1, _MAX_IDLE_SHARE * steps) or not worst.schedule.length_fields("decay"):
        return []
    schedule = worst.schedule
    lowest = f"{schedule.min_lr:g}"
    remedy = f"lower steps to {worst.decay_step}"
    if worst.last_step < steps:
        remedy = f"switch in step {worst.decay_step + 1}"
    detail = (
        f"{worst.field('decay')} with min_lr={lowest} leaves a rate of {lowest} for {idle} "
        f"of training.steps={steps}; set min_lr above {lowest}, leave {worst.name('decay')} "
        f"out, or {remedy}"
    )
    return [worst.problem(worst.name("decay"), "rate_of_zero", detail)]


def _idle_steps(span: _Span) -> int:
    """Returns the number of steps whose learning rate is 0, or too small to count."""
    schedule = span.schedule
    if schedule.kind == "constant" or schedule.min_lr >= _SMALLEST_RATE:
        return 0
    clock = span.clock
    # The step in which the decay ends is the first one at min_lr, unless the warm-up
    # includes it.
    first = clock.steps_until(span.lengths.decay_end)
    if schedule.kind == "inverse_sqrt":
        # It does not come down to min_lr by itself.
        first = clock.steps_within(span.lengths.decay_end) + 1
    first = max(first, clock.steps_within(span.lengths.warmup) + 1)
    return max(0, span.num_steps - first + 1)


def schedule_warnings(config: TrainConfig) -> list[Problem]:
    """Returns numbers of the learning rate that have little or no effect."""
    warnings = list[Problem]()
    for span in _spans(config, config.training.num_steps):
        warnings += _rate_warnings(span)
        warnings += _unused_warnings(span)
        if span.schedule.kind == "constant":
            warnings += _constant_warnings(span)
        else:
            warnings += _decay_warnings(span)
    return warnings + _switch_warnings(config)


def _rate_warnings(span: _Span) -> list[Problem]:
    """Returns rates that are too small, and a warm-up that is too long."""
    warnings = []
    for phase in span.phases:
        lr = phase.peak_lr
        if lr < _SMALLEST_RATE:
            detail = f"lr={lr:g} is too small to change fp32 weights; raise it"
            pointer = f"/{phase.peak_name.replace('.', '/')}"
            warnings.append(Problem(pointer, "rate_too_small", detail))
    warmup = span.lengths.warmup
    num_samples = span.clock.samples(span.num_steps)
    if warmup >= num_samples:
        phase = span.phases[-1]
        start = span.schedule.init_lr
        highest = start + (phase.peak_lr - start) * num_samples / warmup
        detail = (
            f"{span.field('warmup')} is not shorter than {span.end}: the rate only climbs, to "
            f"{highest:g} in the last step ({phase.peak_name}={phase.peak_lr:g})"
        )
        warnings.append(span.problem(span.name("warmup"), "warmup_too_long", detail))
    return warnings


def _decay_warnings(span: _Span) -> list[Problem]:
    schedule = span.schedule
    warnings = []
    for phase in span.phases:
        if schedule.min_lr == phase.peak_lr:
            detail = (
                f"min_lr={schedule.min_lr:g} equals {phase.peak_name}, so the rate does not "
                "decay"
            )
            warnings.append(span.problem("min_lr", "no_effect", detail))
    # A decay may be meant to be cut off by a switch.
    is_beyond = span.decay_step > span.last_step == span.steps
    if is_beyond and schedule.length_fields("decay"):
        detail = (
            f"{span.field('decay')} is beyond {span.end}: the rate does not come down to "
            f"min_lr={schedule.min_lr:g}"
        )
        warnings.append(span.problem(span.name("decay"), "decay_too_long", detail))
    idle = _idle_steps(span)
    if idle > 1 or idle == span.steps:
        detail = (
            f"the rate is {schedule.min_lr:g} in {idle} of {span.steps} steps, since the decay "
            f"ends at min_lr={schedule.min_lr:g} in step {span.decay_step}; a higher min_lr "
            "trains in them too"
        )
        warnings.append(span.problem("min_lr", "rate_of_zero", detail))
    return warnings


def _unused_warnings(span: _Span) -> list[Problem]:
    """Returns fields that this kind of schedule does not use."""
    schedule = span.schedule
    warnings = []
    if schedule.init_lr > 0 and not schedule.length_fields("warmup"):
        detail = f"init_lr={schedule.init_lr:g} has no effect without warmup_steps"
        warnings.append(span.problem("init_lr", "no_effect", detail))
    if schedule.kind != "wsd":
        for name in (*(f"wsd_decay_{unit}" for unit in UNITS), "wsd_shape"):
            value = getattr(schedule, name)
            if value != type(schedule).model_fields[name].default:
                detail = f"{name}={value} has no effect with kind={schedule.kind}"
                warnings.append(span.problem(name, "no_effect", detail))
    return warnings


def _constant_warnings(span: _Span) -> list[Problem]:
    warnings = []
    for name in ("min_lr", *(f"decay_{unit}" for unit in UNITS)):
        value = getattr(span.schedule, name)
        if value:
            detail = (
                f"{name}={_shown(value)} has no effect with kind=constant, which does not "
                "decay"
            )
            warnings.append(span.problem(name, "no_effect", detail))
    return warnings


def _switch_warnings(config: TrainConfig) -> list[Problem]:
    """Returns switches that the run does not reach, and a weight decay that stays."""
    steps = config.training.num_steps
    optimizer = config.optimizer
    warnings = []
    for index, switch in enumerate(optimizer.switches):
        if switch.step > steps:
            detail = (
                f"step={switch.step} is beyond training.steps={steps}, so nothing switches"
            )
            pointer = f"/optimizer/switches/{index}/step"
            warnings.append(Problem(pointer, "beyond_the_run", detail))
    schedule = optimizer.weight_decay_schedule
    if schedule is not None and schedule.end == optimizer.weight_decay:
        detail = f"end={schedule.end:g} equals optimizer.weight_decay, so the decay does not change"
        pointer = "/optimizer/weight_decay_schedule/end"
        warnings.append(Problem(pointer, "no_effect", detail))
    return warnings
