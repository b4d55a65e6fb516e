"""Builds the parameter table: a rank's tensors, and which boxes of what lie in them.

Everything that touches weights (initialisation, fused layers, buckets, clipping,
checkpoints, conversion, planning) reads this table, and nothing derives it anew. Pure
Python. Must not know: torch, process groups.
"""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from megatron_ray.config.model import ModelConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.layout import StageContents, split_into_stages
from megatron_ray.sharding.layer_specs import ShardPosition, padded_rows
from megatron_ray.sharding.named_layers import named_layers
from megatron_ray.sharding.parameter_types import LocalParameter, LogicalParameter


def padded_vocabulary(model: ModelConfig, tp: int) -> int:
    """Returns the rows of the embedding with padding, over all tp ranks."""
    return padded_rows(model.vocabulary, model.vocab_multiple, tp)


def local_parameters(
    model: ModelConfig,
    dims: ParallelDims,
    rank: int,
    *,
    sequence_parallel: bool = False,
    stages: Sequence[StageContents] | None = None,
) -> tuple[LocalParameter, ...]:
    """Returns the tensors of one rank, in the order in which the forward pass uses them.

    `stages`: its pipeline stages; the whole model when not given.

    Raises ValueError when a degree does not divide a dimension that it cuts (validation
    refuses such a config earlier, with the remedy).
    """
    position = ShardPosition.of_rank(dims, rank, sequence_parallel=sequence_parallel)
    if stages is None:
        stages = whole_model(model)
    # A pure function of config and rank: every rank, and the planner, can compute the
    # table of any other rank without communication.
    table: list[LocalParameter] = []
    for name, spec in named_layers(model, stages):
        table.extend(spec.parameters(name, position))
    return tuple(table)


def whole_model(model: ModelConfig) -> tuple[StageContents, ...]:
    """Returns the one stage that contains everything."""
    return split_into_stages(model.num_layers, 1, num_mtp_layers=model.num_mtp_layers)


def logical_parameters(model: ModelConfig) -> tuple[LogicalParameter, ...]:
    """Returns every logical parameter of the model, in forward order."""
    # On one rank nothing is cut, so each logical parameter is a part exactly once.
    logical: list[LogicalParameter] = []
    for local in local_parameters(model, ParallelDims(), 0):
        logical.extend([part.logical for part in local.parts])
    return tuple(logical)


def freeze(
    table: Sequence[LocalParameter], patterns: Sequence[str]
) -> tuple[LocalParameter, ...]:
    """Returns the table with those parameters frozen whose logical names match.

    Parts of one tensor are frozen together or not at all: validation refuses anything
    else.
    """
    frozen = []
    for local in table:
        # Kept in the table: a frozen parameter is still loaded, saved and exported.
        if _matches(local, patterns):
            local = replace(local, trainable=False)
        frozen.append(local)
    return tuple(frozen)


def _matches(local: LocalParameter, patterns: Sequence[str]) -> bool:
    for part in local.parts:
        for pattern in patterns:
            if fnmatchcase(part.logical.name, pattern):
                return True
    return False
