"""Checks the names of frozen parameters, `optimizer.freeze`.

Pure. Must not know: how many ranks there are.
"""

from collections.abc import Sequence

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.sharding.parameter_types import LocalParameter
from megatron_ray.sharding.parameters import freeze, name_matcher
from megatron_ray.validation.parameters.patterns import (
    ParameterNames,
    names_of,
    unmatched_patterns,
    whole_table,
)

_POINTER = "/optimizer/freeze"


def freezing_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `optimizer.freeze`.

    Every pattern must match a parameter, parameters that are stored as one tensor must
    be frozen together, and some parameter must be left to train.
    """
    patterns = config.optimizer.freeze
    if not patterns:
        return []
    parameters = freeze(whole_table(config), patterns)
    names = names_of(parameters)
    problems = unmatched_patterns(ParameterNames(names), patterns, _POINTER)
    split_problem = _partly_frozen_tensor(parameters, patterns)
    if split_problem is not None:
        problems.append(split_problem)
    elif not any(parameter.trainable for parameter in parameters):
        detail = (
            f"all {len(names)} parameters are frozen, so nothing would be trained; leave some "
            "out"
        )
        problems.append(Problem(_POINTER, "freeze_all", detail))
    return problems


def _partly_frozen_tensor(
    parameters: Sequence[LocalParameter], patterns: Sequence[str]
) -> Problem | None:
    """Returns the problem of the first tensor of which only a part is frozen, if any."""
    is_frozen = name_matcher(patterns)
    for parameter in parameters:
        names = names_of([parameter])
        trained = [name for name in names if not is_frozen(name)]
        # `freeze` freezes a tensor as soon as one of its parts matches.
        if parameter.trainable or not trained:
            continue
        detail = (
            f"{', '.join(map(repr, names))} are one tensor, and "
            f"{', '.join(map(repr, trained))} would still be trained; freeze all or none"
        )
        return Problem(_POINTER, "freeze_whole", detail)
    return None
