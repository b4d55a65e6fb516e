"""Plans the flat buffers of one rank as they will be allocated.

They come from the same parameter table, buckets and row shards that the model on a rank
is built from, without a process group.

Owns: which parameters go into which buffer, and which ranks hold alike. Pure. Must not
know: torch, nodes.
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
    """A flat buffer: the dense parameters of a rank, or its experts."""

    plan: BucketPlan
    of_expert: bool
    width: int
    """Bytes of a weight."""
    replicas: int
    """Number of ranks that reduce its gradients together."""
    replica_rank: int
    """This rank's index among them."""
    sharded: bool
    """Whether each of them updates only a part (ZeRO-1)."""

    @property
    def num_updated(self) -> int:
        """Elements that this rank updates, padding included."""
        if self.sharded:
            return self.plan.num_trainable // self.replicas
        return self.plan.num_trainable

    def owned(self, start: int, end: int) -> int:
        """Returns how many elements [start, end) of one bucket this rank updates."""
        for bucket in self.plan.buckets:
            if not bucket.start <= start < bucket.end:
                continue
            low = bucket.start
            high = bucket.end
            if self.sharded:
                low, high = bucket.shard(self.replica_rank, self.replicas)
            return max(0, min(end, high) - max(start, low))
        return 0


def is_fully_sharded(config: TrainConfig, dims: ParallelDims) -> bool:
    """Returns whether ZeRO-3 shards parameters over at least two ranks."""
    return config.parallel.zero == 3 and dims.size("dp", "cp") > dims.zero_replicas


@dataclass(frozen=True)
class RankBuffers:
    """The parameters of a rank and the flat buffers that they are laid out in."""

    rank: int
    pp_rank: int
    table: tuple[LocalParameter, ...]
    buffers: tuple[PlannedBuffer, ...]


def rank_buffers(
    config: TrainConfig, dims: ParallelDims, pipeline: PipelinePlan, rank: int
) -> RankBuffers:
    """Returns the buffers of one rank of a resolved config.

    Raises ValueError while the vocabulary is not known.
    """
    pp_rank = dims.coordinates(rank)["pp"]
    parameters = local_parameters(
        config.model,
        dims,
        rank,
        sequence_parallel=config.parallel.sequence_parallel,
        stages=pipeline.stages_of(pp_rank),
    )
    table = freeze(parameters, config.optimizer.freeze)
    buffers = _planned_buffers(config, dims, table, rank)
    return RankBuffers(rank, pp_rank, tuple(table), tuple(buffers))


def distinct_buffers(
    config: TrainConfig, dims: ParallelDims, pipeline: PipelinePlan
) -> list[RankBuffers]:
    """Returns the buffers of one rank of each kind of pipeline rank.

    Of pipeline ranks with equal contents it is the first, which keeps most activations:
    a later rank never has more microbatches in flight.
    """
    by_kind: dict[object, RankBuffers] = {}
    for pp_rank in range(dims.pp):
        kind = _kind(config, pipeline, pp_rank)
        if kind not in by_kind:
            rank = dims.rank_at(pp=pp_rank)
            by_kind[kind] = rank_buffers(config, dims, pipeline, rank)
    return list(by_kind.values())


def _kind(config: TrainConfig, pipeline: PipelinePlan, pp_rank: int) -> object:
    """Returns a value that is equal for pipeline ranks with equally many bytes."""
    kind = list[object]()
    for stage in pipeline.stages_of(pp_rank):
        layers = tuple(config.model.experts_on(layer) is not None for layer in stage.layers)
        kind.append((stage.embedding, stage.loss, len(stage.mtp_layers), layers))
    # In the V of zb-v the ranks with equal contents differ in what they keep at once,
    # and patterns of frozen parameters may name single layers: no two ranks are alike.
    if pipeline.schedule == "zb-v" or config.optimizer.freeze:
        kind.append(pp_rank)
    return tuple(kind)


def _planned_buffers(
    config: TrainConfig, dims: ParallelDims, table: Sequence[LocalParameter], rank: int
) -> list[PlannedBuffer]:
    """Returns the buffers for these tensors: first the dense ones, then any experts."""
    dense = list[LocalParameter]()
    experts = list[LocalParameter]()
    for parameter in table:
        if parameter.of_expert:
            experts.append(parameter)
        else:
            dense.append(parameter)
    replicas = dims.group_of(rank, ("dp", "cp"))
    expert_replicas = dims.experts.group_of(rank, ("edp",))
    if is_fully_sharded(config, dims):
        # With zero_replicas dense rows are sharded over a part of the replicas only.
        shard_group = dims.shard_levels_of(rank)[0]
        buffers = [_sharded_rows(config, dense, rank, replicas, shard_group)]
        if experts:
            buffers.append(
                _sharded_rows(config, experts, rank, expert_replicas, expert_replicas)
            )
        return buffers
    buffers = [_whole_weights(config, dense, rank, replicas)]
    if experts:
        buffers.append(_whole_weights(config, experts, rank, expert_replicas))
    return buffers


def _whole_weights(
    config: TrainConfig,
    parameters: Sequence[LocalParameter],
    rank: int,
    replicas: Sequence[int],
) -> PlannedBuffer:
    """Returns a buffer with whole weights (ZeRO-0 and ZeRO-1)."""
    return PlannedBuffer(
        plan=plan_buckets(parameters, len(replicas), config.parallel.bucket_elements),
        of_expert=_are_experts(parameters),
        width=width_of(config),
        replicas=len(replicas),
        replica_rank=replicas.index(rank),
        sharded=config.parallel.zero == 1,
    )


def _sharded_rows(
    config: TrainConfig,
    parameters: Sequence[LocalParameter],
    rank: int,
    replicas: Sequence[int],
    shard_group: Sequence[int],
) -> PlannedBuffer:
    """Returns a buffer with this rank's rows of the weights in fp32 (ZeRO-3)."""
    rows = shard_rows(parameters, shard_group.index(rank), len(shard_group))
    return PlannedBuffer(
        # torch reduces these gradients itself, so buckets need no padding for replicas.
        plan=plan_buckets(rows, 1, config.parallel.bucket_elements),
        of_expert=_are_experts(parameters),
        width=4,
        replicas=len(replicas),
        replica_rank=replicas.index(rank),
        sharded=False,
    )


def _are_experts(parameters: Sequence[LocalParameter]) -> bool:
    return bool(parameters) and parameters[0].of_expert
