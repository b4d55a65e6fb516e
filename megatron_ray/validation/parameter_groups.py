"""Checks `optimizer.groups`: names of parameters, and that a group has an effect.

Pure. Must not know: how many ranks there are.
"""

from megatron_ray.config.optimizer import ParameterGroupConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.sharding.parameters import freeze, matches
from megatron_ray.validation.parameter_patterns import (
    names_of,
    unmatched_patterns,
    whole_table,
)


def group_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `optimizer.groups`.

    Every pattern must match a parameter, and every group must set a number of some
    parameter that is trained.
    """
    groups = config.optimizer.groups
    if not groups:
        return []
    table = freeze(whole_table(config), config.optimizer.freeze)
    names = names_of(table)
    trained = names_of([parameter for parameter in table if parameter.trainable])
    problems = list[Problem]()
    for index, group in enumerate(groups):
        pointer = f"/optimizer/groups/{index}"
        if not _numbers(group):
            detail = (
                "the group sets nothing; give weight_decay, lr_scale, beta1, beta2 or eps, or "
                "leave it out"
            )
            problems.append(Problem(pointer, "group_without_effect", detail))
        unmatched = unmatched_patterns(names, group.parameters, f"{pointer}/parameters")
        problems += unmatched
        if not unmatched and not any(matches(name, group.parameters) for name in trained):
            detail = (
                "all parameters of the group are frozen by optimizer.freeze; leave the group "
                "out, or freeze fewer"
            )
            problems.append(
                Problem(f"{pointer}/parameters", "group_without_effect", detail)
            )
    return problems


def group_notes(config: TrainConfig) -> list[str]:
    """Returns a line per group: what it sets, and for how many parameters."""
    if not config.optimizer.groups:
        return []
    table = freeze(whole_table(config), config.optimizer.freeze)
    trained = names_of([parameter for parameter in table if parameter.trainable])
    notes = []
    for index, group in enumerate(config.optimizer.groups):
        members = [name for name in trained if matches(name, group.parameters)]
        numbers = ", ".join(f"{key}={value:g}" for key, value in _numbers(group).items())
        notes.append(
            f"optimizer.groups[{index}] sets {numbers} for {len(members)} of {len(trained)} "
            "trained tensors"
        )
    return notes


def _numbers(group: ParameterGroupConfig) -> dict[str, float]:
    return group.model_dump(exclude={"parameters"}, exclude_none=True)
