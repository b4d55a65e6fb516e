"""Checks `optimizer.groups`: names of parameters, and that a group has an effect.

Pure. Must not know: how many ranks there are.
"""

from megatron_ray.config.optimizer import (
    OPTIONAL_NUMBERS,
    OptimizerConfig,
    ParameterGroupConfig,
)
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.sharding.parameters import freeze, name_matcher
from megatron_ray.validation.parameters.patterns import (
    ParameterNames,
    names_of,
    unmatched_patterns,
    whole_table,
)

_MAX_COMPARED = 200_000
"""Names times patterns, up to which the members of a group are counted."""


def group_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `optimizer.groups`.

    Every pattern must match a parameter, and every group must set a number of some
    parameter that is trained.
    """
    groups = config.optimizer.groups
    if not groups:
        return []
    names = ParameterNames(names_of(whole_table(config)))
    trained = names
    if config.optimizer.freeze:
        trained = ParameterNames(_trained_names(config))
    problems = list[Problem]()
    for index, group in enumerate(groups):
        pointer = f"/optimizer/groups/{index}"
        if not _numbers(group):
            detail = (
                "the group sets nothing; give weight_decay, lr_scale, beta1, beta2 or eps, or "
                "leave it out"
            )
            problems.append(Problem(pointer, "group_without_effect", detail))
        problems += _unused_numbers(config.optimizer, group, pointer)
        unmatched = unmatched_patterns(names, group.parameters, f"{pointer}/parameters")
        problems += unmatched
        if not unmatched and not any(map(trained.has_match, group.parameters)):
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
    trained = _trained_names(config)
    notes = []
    for index, group in enumerate(config.optimizer.groups):
        numbers = ", ".join(f"{key}={value:g}" for key, value in _numbers(group).items())
        members = ""
        # Experts are too many to be compared with many patterns.
        if len(trained) * len(group.parameters) <= _MAX_COMPARED:
            is_member = name_matcher(group.parameters)
            num_members = len(list(filter(is_member, trained)))
            members = f" for {num_members} of {len(trained)} trained tensors"
        notes.append(f"optimizer.groups[{index}] sets {numbers}{members}")
    return notes


def _trained_names(config: TrainConfig) -> list[str]:
    table = freeze(whole_table(config), config.optimizer.freeze)
    return names_of([parameter for parameter in table if parameter.trainable])


def _unused_numbers(
    optimizer: OptimizerConfig, group: ParameterGroupConfig, pointer: str
) -> list[Problem]:
    """Returns the numbers of a group that the optimizer has not."""
    problems = []
    for name in _numbers(group):
        if name in OPTIONAL_NUMBERS and getattr(optimizer, name) is None:
            detail = f"{optimizer.name} does not use {name}; leave it out"
            problems.append(Problem(f"{pointer}/{name}", "group_without_effect", detail))
    return problems


def _numbers(group: ParameterGroupConfig) -> dict[str, float]:
    return group.model_dump(exclude={"parameters"}, exclude_none=True)
