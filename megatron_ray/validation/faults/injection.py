"""Checks injected faults against the rules that are to notice them.

Pure. Must not know: how numbers are judged.
"""

from collections.abc import Iterator

from megatron_ray.config.faults.injection import FaultConfig
from megatron_ray.config.faults.rules import RuleConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation.resolution import world_size


def injection_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `training.inject_faults`."""
    training = config.training
    problems = []
    for index, fault in enumerate(training.inject_faults):
        pointer = f"/training/inject_faults/{index}"
        details = [
            *_rule_problems(fault, training.rules),
            *_step_problems(fault, training.rules, training.known_steps),
        ]
        for name, code, detail in details:
            problems.append(Problem(f"{pointer}/{name}", code, detail))
    return problems


def _rule_problems(
    fault: FaultConfig, rules: tuple[RuleConfig, ...]
) -> Iterator[tuple[str, str, str]]:
    """Yields field, code and detail where no rule would distinguish the fault."""
    first = _first_broken(fault, rules)
    if first is None:
        kinds = sorted({rule.when for rule in rules})
        remedy = f"add one to training.rules with when={fault.breaks}"
        if kinds:
            remedy += f", or use breaks={kinds[0]}"
        detail = f"breaks={fault.breaks} is what no rule looks for; {remedy}"
        yield "breaks", "no_rule", detail
    elif fault.kind != "correct" and not rules[first].rerun:
        detail = (
            f"kind={fault.kind} is distinguished by computing the step again, which "
            f"training.rules[{first}] does not; set its rerun: true, or use kind=correct"
        )
        yield "kind", "no_rerun", detail


def _step_problems(
    fault: FaultConfig, rules: tuple[RuleConfig, ...], num_steps: int | None
) -> Iterator[tuple[str, str, str]]:
    """Yields field, code and detail of steps that the fault cannot strike."""
    if (fault.steps is None) == (fault.every_steps is None):
        given = "both steps and every_steps are"
        if fault.steps is None:
            given = "neither steps nor every_steps is"
        yield "steps", "fault_steps", f"{given} given; give one of them"
        return
    name = "steps"
    first_step = min(fault.steps or (0,))
    last_step = max(fault.steps or (0,))
    if fault.every_steps is not None:
        name = "every_steps"
        first_step = last_step = fault.every_steps
    if num_steps is not None and last_step > num_steps:
        detail = f"step {last_step} is beyond the run's last step, {num_steps}; strike earlier ones"
        yield name, "beyond_the_run", detail
    # Multiples of every_steps come after any baseline.
    if fault.steps is None or _first_broken(fault, rules) is None:
        return
    num_samples = min(_baselines(fault, rules))
    if first_step <= num_samples:
        detail = (
            f"step {first_step} is one of the first {num_samples}, after which rules with "
            f"when={fault.breaks} have a baseline; strike step {num_samples + 1} or later"
        )
        yield name, "no_baseline", detail


def _first_broken(fault: FaultConfig, rules: tuple[RuleConfig, ...]) -> int | None:
    """Returns the index of the first rule that a struck step breaks."""
    for index, rule in enumerate(rules):
        if rule.when == fault.breaks:
            return index
    return None


def _baselines(fault: FaultConfig, rules: tuple[RuleConfig, ...]) -> Iterator[int]:
    """Yields the steps after which each rule can notice the fault."""
    for rule in rules:
        if rule.when == fault.breaks:
            yield rule.samples if rule.has_baseline else 0


def injection_warnings(config: TrainConfig) -> list[Problem]:
    """Returns a warning of a run that is a rehearsal, and of ranks that it does not have.

    It may have them at another size, to which an elastic job changes.
    """
    faults = config.training.inject_faults
    if not faults:
        return []
    detail = (
        f"the run is a rehearsal: {len(faults)} faults are injected into its numbers, and its "
        "rules act on them; leave inject_faults out of a run that counts"
    )
    warnings = [Problem("/training/inject_faults", "rehearsal", detail)]
    if config.parallel.dp == "auto":
        return warnings
    num_ranks = world_size(config)
    for index, fault in enumerate(faults):
        if fault.rank >= num_ranks:
            detail = (
                f"there is no rank {fault.rank}: the run has {num_ranks} ranks, numbered from "
                "0, so the fault strikes nothing"
            )
            pointer = f"/training/inject_faults/{index}/rank"
            warnings.append(Problem(pointer, "no_rank", detail))
    return warnings
