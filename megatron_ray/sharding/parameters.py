"""Builds the parameter table: a rank's tensors and the logical boxes in them.

All code that uses weights (initialisation, fused layers, buckets, clipping,
checkpoints, conversion, planning) reads this table and never derives layouts itself.
Pure Python. Must not know: torch, process groups.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import translate

from megatron_ray.config.model import ModelConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.layout import StageContents, split_into_stages
from megatron_ray.sharding.layer_specs import ShardPosition, padded_rows
from megatron_ray.sharding.mup import scale_rates
from megatron_ray.sharding.named_layers import named_layers
from megatron_ray.sharding.parameter_types import LocalParameter, LogicalParameter


def padded_vocabulary(model: ModelConfig, tp: int) -> int:
    """Returns the padded rows of the embedding over all tp ranks."""
    return padded_rows(model.vocabulary, model.vocab_multiple, tp)


def local_parameters(
    model: ModelConfig,
    dims: ParallelDims,
    rank: int,
    *,
    sequence_parallel: bool = False,
    stages: Sequence[StageContents] | None = None,
) -> tuple[LocalParameter, ...]:
    """Returns the tensors of one rank in forward order.

    `stages`: its pipeline stages; by default the whole model.

    Raises ValueError when a degree does not divide a sharded dimension (validation
    reports such configs earlier, with the remedy).
    """
    position = ShardPosition.of_rank(dims, rank, sequence_parallel=sequence_parallel)
    if stages is None:
        stages = whole_model(model)
    # A pure function of config and rank: every rank, and the planner, can compute the
    # table of any other rank without communication.
    table: list[LocalParameter] = []
    for name, spec in named_layers(model, stages):
        table.extend(spec.parameters(name, position))
    return scale_rates(table, model)


def whole_model(model: ModelConfig) -> tuple[StageContents, ...]:
    """Returns the one stage that contains everything."""
    return split_into_stages(model.num_layers, 1, num_mtp_layers=model.num_mtp_layers)


def logical_parameters(model: ModelConfig) -> tuple[LogicalParameter, ...]:
    """Returns every logical parameter of the model, in forward order."""
    # On one rank nothing is sharded, so each logical parameter is exactly one part.
    logical: list[LogicalParameter] = []
    for local in local_parameters(model, ParallelDims(), 0):
        logical.extend([part.logical for part in local.parts])
    return tuple(logical)


def freeze(
    table: Sequence[LocalParameter], patterns: Sequence[str]
) -> tuple[LocalParameter, ...]:
    """Returns the table with parameters frozen that match by logical name.

    Parts of one tensor are frozen together or not at all, which validation ensures.
    """
    is_frozen = name_matcher(patterns)
    frozen = []
    for local in table:
        # Kept in the table, since frozen parameters are still loaded, saved and exported.
        if any(is_frozen(part.logical.name) for part in local.parts):
            local = replace(local, trainable=False)
        frozen.append(local)
    return tuple(frozen)


def name_matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Returns the function that returns whether a name matches one of the patterns."""
    if not patterns:
        return lambda name: False
    # One expression for all, since a model may have tens of thousands of names.
    is_match = re.compile("|".join(map(translate, patterns))).match
    return lambda name: is_match(name) is not None
