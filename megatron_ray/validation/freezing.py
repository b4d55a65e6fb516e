"""Checks the names of frozen parameters, `optimizer.freeze`.

Pure. Must not know: how many ranks there are.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.sharding.parameter_types import LocalParameter
from megatron_ray.sharding.parameters import freeze, local_parameters

_POINTER = "/optimizer/freeze"


def freezing_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `optimizer.freeze`.

    Every pattern must match a parameter, parameters that are stored as one tensor must
    be frozen together, and some parameter must be left to train.
    """
    patterns = config.optimizer.freeze
    if not patterns:
        return []
    # Names do not depend on the vocabulary, which may still be unknown, nor on the
    # layout, so that of a single rank is listed.
    vocab_size = config.model.vocab_size or 2
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    parameters = freeze(local_parameters(model, ParallelDims(), 0), patterns)
    names = list[str]()
    for parameter in parameters:
        names += _names(parameter)

    problems = _unmatched_patterns(names, patterns)
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


def _names(parameter: LocalParameter) -> list[str]:
    """Returns the names of the logical parameters that are fused into one tensor."""
    return [part.logical.name for part in parameter.parts]


def _is_frozen(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _unmatched_patterns(names: Sequence[str], patterns: Sequence[str]) -> list[Problem]:
    block_name = next(name for name in names if name.startswith("layers."))
    problems = []
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            detail = (
                f"no parameter matches {pattern!r}; names are such as {names[0]!r} and "
                f"{block_name!r}, and * matches any characters"
            )
            problems.append(Problem(_POINTER, "freeze_names", detail))
    return problems


def _partly_frozen_tensor(
    parameters: Sequence[LocalParameter], patterns: Sequence[str]
) -> Problem | None:
    """Returns the problem of the first tensor of which only a part is frozen, if any."""
    for parameter in parameters:
        names = _names(parameter)
        trained = [name for name in names if not _is_frozen(name, patterns)]
        # `freeze` freezes a tensor as soon as one of its parts matches.
        if parameter.trainable or not trained:
            continue
        detail = (
            f"{', '.join(map(repr, names))} are one tensor, and "
            f"{', '.join(map(repr, trained))} would still be trained; freeze all or none"
        )
        return Problem(_POINTER, "freeze_whole", detail)
    return None
