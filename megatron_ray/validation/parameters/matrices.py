"""Checks numbers that matrices do not use where an optimizer updates them whole.

Pure. Must not know: how many ranks there are.
"""

from megatron_ray.config.optimizer_kinds import updates_matrices
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.sharding.matrices import matrices_of
from megatron_ray.sharding.parameter_types import LocalParameter
from megatron_ray.sharding.parameters import freeze, name_matcher
from megatron_ray.validation.parameters.patterns import names_of, whole_table

_OF_ADAMW = ("beta1", "beta2", "eps")


def matrix_problems(config: TrainConfig) -> list[Problem]:
    """Returns the numbers of AdamW in groups that have nothing but matrices."""
    optimizer = config.optimizer
    if not optimizer.groups or not updates_matrices(optimizer):
        return []
    others = names_of(_others(config))
    problems = []
    for index, group in enumerate(optimizer.groups):
        if any(map(name_matcher(group.parameters), others)):
            continue
        for name in _OF_ADAMW:
            if getattr(group, name) is None:
                continue
            detail = (
                f"the group has nothing but matrices, which {optimizer.name} updates without "
                f"{name}; leave it out"
            )
            pointer = f"/optimizer/groups/{index}/{name}"
            problems.append(Problem(pointer, "group_without_effect", detail))
    return problems


def matrix_notes(config: TrainConfig) -> list[str]:
    """Returns a line with the number of matrices that are updated whole."""
    muon = config.optimizer.muon
    if muon is None:
        return []
    num_matrices = 0
    for parameter in freeze(whole_table(config), config.optimizer.freeze):
        num_matrices += len(matrices_of(parameter, muon))
    num_others = len(names_of(_others(config)))
    return [
        f"optimizer.name={config.optimizer.name} updates {num_matrices} matrices by Muon and "
        f"{num_others} other tensors by AdamW"
    ]


def _others(config: TrainConfig) -> list[LocalParameter]:
    """Returns the trained tensors that have no matrix; parts of a tensor are alike."""
    others = []
    for parameter in freeze(whole_table(config), config.optimizer.freeze):
        if parameter.trainable and not parameter.parts[0].logical.is_matrix:
            others.append(parameter)
    return others
