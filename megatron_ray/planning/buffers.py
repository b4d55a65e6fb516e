"""Flat buffers of one rank, as they will be allocated.

Owns: which parameters go into which buffer and who has the same one.

The same table, buckets and row shards as the model on a rank is built from, without a
process group. Pure. Must not know: torch, nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan
from megatron_ray.planning.microbatch import width_of
from megatron_ray.sharding.buckets import BucketPlan, plan_buckets
from megatron_ray.sharding.parameter_types import LocalParameter
from megatron_ray.sharding.parameters import freeze, local_parameters
from megatron_ray.sharding.row_shards import shard_rows


@dataclass(frozen=True)
class PlannedBuffer:
    """The dense parameters of a rank, or its experts, one after another."""

    plan: BucketPlan
    of_expert: bool
    width: int
    """Bytes of a weight."""
    replicas: int
    """Ranks that reduce its gradients together."""
    replica_rank: int
    """This rank's index among them."""
    sharded: bool
    """Whether each of them updates a part only (ZeRO-1)."""

    @property
    def num_updated(self) -> int:
        """Elements that this rank updates, padding included."""
        return (
            self.plan.num_trainable // self.replicas
            if self.sharded
            else self.plan.num_trainable
        )

    def owned(self, start: int, end: int) -> int:
        """How many of the elements [start, end) of one bucket this rank updates."""
        for bucket in self.plan.buckets:
            if bucket.start <= start < bucket.end:
                low, high = (
                    bucket.shard(self.replica_rank, self.replicas)
                    if self.sharded
                    else (bucket.start, bucket.end)
                )
                return max(0, min(end, high) - max(start, low))
        return 0


def is_fully_sharded(config: TrainConfig, dims: ParallelDims) -> bool:
    """Whether parameters themselves are cut over the replicas: ZeRO-3, where there is
    anybody to share with.
    """
    return config.parallel.zero == 3 and dims.size("dp", "cp") > dims.zero_replicas


@dataclass(frozen=True)
class RankBuffers:
    """What a rank holds, whole and as it is laid out."""

    rank: int
    pp_rank: int
    table: tuple[LocalParameter, ...]
    buffers: tuple[PlannedBuffer, ...]


def rank_buffers(
    config: TrainConfig, dims: ParallelDims, pipeline: PipelinePlan, rank: int
) -> RankBuffers:
    """Of one rank of a resolved config whose vocabulary is known.

    Raises ValueError otherwise.
    """
    pp_rank = dims.coordinates(rank)["pp"]
    held = pipeline.held(pp_rank)
    sequence_parallel = config.parallel.sequence_parallel
    table = freeze(
        local_parameters(
            config.model, dims, rank, sequence_parallel=sequence_parallel, held=held
        ),
        config.optimizer.freeze,
    )
    return RankBuffers(
        rank, pp_rank, tuple(table), tuple(_planned_buffers(config, dims, table, rank))
    )


def distinct_buffers(
    config: TrainConfig, dims: ParallelDims, pipeline: PipelinePlan
) -> list[RankBuffers]:
    """The first rank of each kind of pipeline stage: of those that hold alike the one
    that keeps most activations.
    """
    found: dict[object, RankBuffers] = {}
    for pp_rank in range(dims.pp):
        alike = _signature(config, pipeline, pp_rank)
        if alike not in found:
            found[alike] = rank_buffers(config, dims, pipeline, dims.rank_at(pp=pp_rank))
    return list(found.values())


def _signature(config: TrainConfig, pipeline: PipelinePlan, pp_rank: int) -> object:
    """Equal for pipeline ranks that hold equally many bytes: a later rank with the same
    parts has no more microbatches under way.
    """
    model = config.model
    return tuple(
        (
            stage.embedding,
            stage.loss,
            len(stage.mtp_layers),
            tuple(model.experts_on(layer) is not None for layer in stage.layers),
        )
        for stage in pipeline.held(pp_rank)
    ) + ((pp_rank,) if pipeline.schedule == "zb-v" or config.optimizer.freeze else ())


def _planned_buffers(
    config: TrainConfig, dims: ParallelDims, table: Sequence[LocalParameter], rank: int
) -> list[PlannedBuffer]:
    """The buffers that a rank allocates for these tensors: dense ones first, then the
    experts where it has any.
    """
    fully = is_fully_sharded(config, dims)
    found = []
    dense = dims.group_of(rank, ("dp", "cp"))
    experts = dims.experts.group_of(rank, ("edp",))
    for of_expert, group in ((False, dense), (True, experts)):
        parameters = [parameter for parameter in table if parameter.of_expert == of_expert]
        if of_expert and not parameters:
            continue
        if fully:
            shard = experts if of_expert else dims.shard_levels_of(rank)[0]
            rows = shard_rows(parameters, shard.index(rank), len(shard))
            plan = plan_buckets(rows, 1, config.parallel.bucket_elements)
            found.append(
                PlannedBuffer(
                    plan, of_expert, 4, len(group), group.index(rank), sharded=False
                )
            )
            continue
        plan = plan_buckets(parameters, len(group), config.parallel.bucket_elements)
        width = width_of(config)
        sharded = config.parallel.zero == 1
        found.append(
            PlannedBuffer(plan, of_expert, width, len(group), group.index(rank), sharded)
        )
    return found
