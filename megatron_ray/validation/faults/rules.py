"""Checks the rules for the numbers of steps against each other and the rest of a run.

Pure. Must not know: how numbers are judged.
"""

from collections.abc import Iterator

from megatron_ray.config.faults.rules import RuleConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig


def rule_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `training.rules`."""
    training = config.training
    problems = list[Problem]()
    index_of: dict[str, int] = {}
    for index, rule in enumerate(training.rules):
        pointer = f"/training/rules/{index}"
        for name, detail in _unused_fields(rule):
            problems.append(Problem(f"{pointer}/{name}", "rule_field", detail))
        if rule.action == "skip" and training.max_skipped_steps == 0:
            detail = (
                "action=skip needs training.max_skipped_steps, the number of steps of the job "
                "that may be skipped, which is 0; set it, to 10 for instance"
            )
            problems.append(Problem(f"{pointer}/action", "no_skips", detail))
        if rule.action == "rollback" and training.max_rollbacks == 0:
            detail = "action=rollback needs training.max_rollbacks above 0; raise it, or use stop"
            problems.append(Problem(f"{pointer}/action", "no_rollbacks", detail))
        if rule.before_reduction and config.parallel.zero == 3:
            detail = (
                "before_reduction checks a rank's own gradients, which torch reduces by itself "
                "with parallel.zero=3; leave it out, or use zero=1"
            )
            problems.append(
                Problem(f"{pointer}/before_reduction", "no_own_gradients", detail)
            )
        first = index_of.setdefault(rule.name, index)
        if first != index:
            detail = (
                f"compares the same numbers as training.rules[{first}], which comes first, so "
                "it is never broken; leave one of them out"
            )
            problems.append(Problem(pointer, "rule_twice", detail))
    return problems


def replica_problems(config: TrainConfig) -> list[Problem]:
    """Returns a problem when replicas are to be compared and have different shards."""
    every = config.training.check_replicas_every_steps
    if every is None or config.parallel.zero != 3:
        return []
    detail = (
        f"check_replicas_every_steps={every} compares whole weights, of which every rank has "
        "another shard with parallel.zero=3; leave it out, or use zero=1"
    )
    return [Problem("/training/check_replicas_every_steps", "no_replicas", detail)]


def _unused_fields(rule: RuleConfig) -> Iterator[tuple[str, str]]:
    """Yields fields that are set and have no effect on a rule, with the reason."""
    fields = RuleConfig.model_fields
    changed = [name for name in fields if getattr(rule, name) != fields[name].default]
    for name in changed:
        is_comparison = name in ("factor", "baseline", "samples")
        if rule.when == "not_finite" and (is_comparison or name == "limit"):
            yield name, f"{name} has no effect on when=not_finite; leave it out"
        elif rule.limit is not None and is_comparison:
            yield name, f"{name} is for a rule without limit={rule.limit:g}; leave one out"
        elif rule.action != "rollback" and name in ("back_steps", "leave_out"):
            yield name, f"{name} is for action=rollback, not {rule.action}; leave it out"
        elif rule.when != "not_finite" and name == "before_reduction":
            yield name, f"{name} is for when=not_finite, not {rule.when}; leave it out"


def rule_warnings(config: TrainConfig) -> list[Problem]:
    """Returns rules that the run cannot break, and rollbacks that begin at step 0."""
    training = config.training
    warnings = []
    for index, rule in enumerate(training.rules):
        pointer = f"/training/rules/{index}"
        if rule.has_baseline and rule.samples >= training.num_steps:
            detail = (
                f"samples={rule.samples} is not below training.steps={training.num_steps}, so "
                "no step can break the rule; lower it"
            )
            warnings.append(Problem(f"{pointer}/samples", "beyond_the_run", detail))
        needs_checkpoints = rule.action == "rollback" and rule.steps_back > 1
        if needs_checkpoints and config.checkpoint.every_steps is None:
            detail = (
                f"action=rollback by {rule.steps_back} steps or more goes back to the beginning "
                "of the run without checkpoint.every_steps; set it"
            )
            warnings.append(Problem(f"{pointer}/action", "no_checkpoints", detail))
    return warnings
