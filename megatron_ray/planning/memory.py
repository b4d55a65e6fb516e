"""Bytes on each rank, before anything is started.

Owns: adding up weights, gradients, optimizer state and activations; the fullest rank.

Weights, gradients and optimizer state are those of the flat buffers that will be
allocated, alignment and bucket padding included. Activations are an estimate from
tensor shapes (`activations`). Pure. Must not know: torch, nodes, what a device has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan, plan_pipeline
from megatron_ray.planning.activations import (
    kept_by_stage,
    recomputed_by_stage,
    working_head,
)
from megatron_ray.planning.buffers import (
    RankBuffers,
    distinct_buffers,
    is_fully_sharded,
    rank_buffers,
)
from megatron_ray.planning.microbatch import num_microbatches, width_of
from megatron_ray.planning.pipeline import kept_and_released
from megatron_ray.sharding.parameter_types import LocalParameter


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank."""

    rank: int
    parameters_bytes: int
    """Weights as the model holds them; under ZeRO-3 this rank's rows in fp32."""
    gradients_bytes: int
    """fp32 main gradients of what is trained."""
    optimizer_bytes: int
    """Moments, and fp32 main parameters under bf16; a rank's share where they are
    sharded over dp."""
    gathered_bytes_estimate: int
    """ZeRO-3 only: weights and gradients that are whole for a while: of two layers, and
    of what is in no layer."""
    activations_bytes_estimate: int
    """Peak of the microbatches under way and of what is recomputed; kernels and
    allocator may need more or less."""

    @property
    def total_bytes(self) -> int:
        """Of all terms."""
        state = self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes
        return state + self.gathered_bytes_estimate + self.activations_bytes_estimate

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by what they are for, largest first."""
        found = {
            "weights": self.parameters_bytes,
            "gradients": self.gradients_bytes,
            "optimizer state": self.optimizer_bytes,
            "gathered weights": self.gathered_bytes_estimate,
            "activations": self.activations_bytes_estimate,
        }
        return dict(sorted(found.items(), key=lambda term: -term[1]))


def rank_memory(config: TrainConfig, rank: int) -> RankMemory:
    """Of one rank of a resolved config whose vocabulary is known.

    Raises ValueError otherwise.
    """
    dims = ParallelDims.of(config.parallel)
    pipeline = plan_pipeline(config)
    held = rank_buffers(config, dims, pipeline, rank)
    return with_activations(
        config, pipeline, state_memory(config, dims, held), held.pp_rank
    )


def fullest_rank(config: TrainConfig) -> RankMemory:
    """The rank with most bytes; the first of those that are alike.

    Raises ValueError while dp or the vocabulary are not known.

    Ranks of a pipeline stage have equally much, but for rows that ZeRO-3 cannot deal
    out evenly, of which the first replica has most.
    """
    dims = ParallelDims.of(config.parallel)
    pipeline = plan_pipeline(config)
    kinds = distinct_buffers(config, dims, pipeline)
    found = [
        with_activations(config, pipeline, state_memory(config, dims, held), held.pp_rank)
        for held in kinds
    ]
    return max(found, key=lambda memory: memory.total_bytes)


def with_activations(
    config: TrainConfig, pipeline: PipelinePlan, state: RankMemory, pp_rank: int
) -> RankMemory:
    """The same rank with what it keeps of microbatches, which depends on their size and
    on recomputation too.
    """
    return replace(
        state, activations_bytes_estimate=_activations(config, pipeline, pp_rank)
    )


def state_memory(config: TrainConfig, dims: ParallelDims, held: RankBuffers) -> RankMemory:
    """Of a rank, without activations."""
    buffers = held.buffers
    main = (
        4
        if config.training.precision == "bf16" and not is_fully_sharded(config, dims)
        else 0
    )
    return RankMemory(
        rank=held.rank,
        parameters_bytes=sum(buffer.plan.num_elements * buffer.width for buffer in buffers),
        gradients_bytes=sum(buffer.plan.num_trainable * 4 for buffer in buffers),
        optimizer_bytes=sum(buffer.num_updated * (8 + main) for buffer in buffers),
        gathered_bytes_estimate=_gathered(config, held.table)
        if is_fully_sharded(config, dims)
        else 0,
        activations_bytes_estimate=0,
    )


def _gathered(config: TrainConfig, table: Sequence[LocalParameter]) -> int:
    """Weights of the layer at work and of the next one, one layer's gradients, and what
    belongs to no layer, which stays whole.
    """
    width = width_of(config)
    layers: dict[str, int] = {}
    outside = 0
    for parameter in table:
        kind, index, *_ = parameter.name.split(".")
        if kind in ("layers", "mtp"):
            layers[kind + index] = layers.get(kind + index, 0) + prod(parameter.shape)
        else:
            outside += prod(parameter.shape)
    return outside * (width + 4) + max(layers.values(), default=0) * (2 * width + 4)


def _activations(config: TrainConfig, pipeline: PipelinePlan, pp_rank: int) -> int:
    """The most that is kept at once, and what comes back when a part of it is
    recomputed.
    """
    held = pipeline.held(pp_rank)
    kept = [kept_by_stage(config, stage) for stage in held]
    peak = (
        kept[0]
        if pipeline.stages.num_stages == 1
        else _peak(kept_and_released(pipeline, num_microbatches(config), pp_rank), kept)
    )
    again = max(recomputed_by_stage(config, stage) for stage in held)
    return peak + again + (working_head(config) if any(stage.loss for stage in held) else 0)


def _peak(kept_and_released: Sequence[int], kept: Sequence[int]) -> int:
    """Most bytes at once; `kept` by chunk."""
    now = most = 0
    for event in kept_and_released:
        now += kept[event - 1] if event > 0 else -kept[-event - 1]
        most = max(most, now)
    return most
