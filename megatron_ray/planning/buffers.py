"""Plans the flat buffers of one rank as they will be allocated.

They come from the same parameter table, buckets and row shards that the model on a rank
is built from, without a process group.

Owns: which parameters go into which buffer, and which ranks hold alike. Pure. Must not
know: torch, nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.config.optimizer_kinds import state_bytes, updates_matrices
from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan
from megatron_ray.planning.microbatch import width_of
from megatron_ray.sharding.buckets import BucketPlan, plan_buckets
from megatron_ray.sharding.matrices import Round, rounds_of_buckets, rounds_of_rows
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

    def state_bytes(self, optimizer: OptimizerConfig) -> int:
        """Returns the bytes of the optimizer's state on this rank."""
        each = state_bytes(optimizer, of_matrix=False)
        num_bytes = each * self.num_updated
        if updates_matrices(optimizer):
            of_matrix = state_bytes(optimizer, of_matrix=True)
            share = 0
            if self.sharded:
                share = self.replica_rank
            num_bytes += (of_matrix - each) * self.matrix_elements[share]
        return num_bytes

    def outer_bytes(self, parallel: ParallelismConfig) -> int:
        """Returns the bytes of the state of an outer optimizer on this rank, in fp32."""
        elements = 0
        for bucket in self.plan.buckets:
            for placed in bucket.placed:
                elements += self.owned(placed.start, placed.end)
        return elements * parallel.outer_copies * 4

    @cached_property
    def matrix_elements(self) -> list[int]:
        """Returns how many elements of matrices each replica updates.

        Gaps after a matrix are included. One number where every replica updates all.
        """
        num_shares = 1
        if self.sharded:
            num_shares = self.replicas
        elements = [0] * num_shares
        for bucket in self.plan.buckets:
            length = (bucket.end - bucket.start) // num_shares
            for _, part, start, end in bucket.part_ranges():
                if not part.logical.is_matrix or start == end:
                    continue
                first = (start - bucket.start) // length
                last = (end - 1 - bucket.start) // length
                for share in range(first, last + 1):
                    low = bucket.start + share * length
                    elements[share] += min(end, low + length) - max(start, low)
        return elements

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


def is_multiplied_in_fp8(config: TrainConfig, parameter: LocalParameter) -> bool:
    """Returns whether a parameter is the weight of a layer that multiplies in FP8."""
    fp8 = config.training.fp8
    kind, index, *inner = parameter.name.split(".")
    is_weight = parameter.parts[0].logical.is_matrix and "router" not in inner
    if fp8 is None or kind not in ("layers", "mtp") or not is_weight:
        return False
    layer = int(index)
    if kind == "mtp":
        layer += config.model.num_layers
    return fp8.covers(layer, config.model.num_layers)


def gathered_width(config: TrainConfig, parameter: LocalParameter) -> int:
    """Returns the bytes of an element of a weight that ZeRO-3 has gathered."""
    if config.training.gathers_in_fp8 and is_multiplied_in_fp8(config, parameter):
        return 1
    return width_of(config)


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
    a later rank never has more microbatches in flight. Of its replicas it is the one with
    most optimizer state.
    """
    by_kind: dict[object, RankBuffers] = {}
    for pp_rank in range(dims.pp):
        kind = _kind(config, pipeline, pp_rank)
        if kind not in by_kind:
            rank = dims.rank_at(pp=pp_rank)
            buffers = rank_buffers(config, dims, pipeline, rank)
            fullest = _fullest_replica(config, dims, buffers)
            if fullest != rank:
                buffers = rank_buffers(config, dims, pipeline, fullest)
            by_kind[kind] = buffers
    return list(by_kind.values())


def _fullest_replica(config: TrainConfig, dims: ParallelDims, buffers: RankBuffers) -> int:
    """Returns the first of a rank's replicas with most optimizer state."""
    optimizer = config.optimizer
    # Otherwise they have equally much, or the first one has most (ZeRO-3).
    if config.parallel.zero != 1 or not updates_matrices(optimizer):
        return buffers.rank
    less = state_bytes(optimizer, of_matrix=False)
    less -= state_bytes(optimizer, of_matrix=True)
    spared: dict[int, int] = {}
    for index, rank in enumerate(dims.group_of(buffers.rank, ("dp", "cp"))):
        spared[rank] = 0
        for buffer in buffers.buffers:
            replica = index
            if buffer.of_expert:
                replica = dims.experts.coordinates(rank)["edp"]
            spared[rank] += less * buffer.matrix_elements[replica]
    return min(spared, key=spared.__getitem__)


@dataclass(frozen=True)
class PlannedMatrices:
    """The matrices of a rank's buffer that are updated whole."""

    rounds: tuple[Round, ...]
    of_expert: bool
    replicas: int
    """Number of ranks among which they are spread."""
    replica_rank: int
    tp: int
    """Number of ranks with parts of them."""
    tp_rank: int


def planned_matrices(
    config: TrainConfig, dims: ParallelDims, buffers: RankBuffers
) -> list[PlannedMatrices]:
    """Returns the matrices of a rank by buffer; none if they are updated by element."""
    muon = config.optimizer.muon
    if muon is None:
        return []
    planned = []
    experts = dims.experts.coordinates(buffers.rank)
    shard_group = dims.shard_levels_of(buffers.rank)[0]
    for buffer in buffers.buffers:
        replicas = 1
        replica_rank = 0
        tp = dims.tp
        tp_rank = dims.coordinates(buffers.rank)["tp"]
        if buffer.of_expert:
            tp = dims.expert_tp
            tp_rank = experts["etp"]
        if is_fully_sharded(config, dims):
            replicas = len(shard_group)
            replica_rank = shard_group.index(buffers.rank)
            if buffer.of_expert:
                replicas = buffer.replicas
                replica_rank = buffer.replica_rank
            table = [row for row in buffers.table if row.of_expert == buffer.of_expert]
            rounds = rounds_of_rows(table, muon, replicas)
        else:
            if buffer.sharded:
                replicas = buffer.replicas
                replica_rank = buffer.replica_rank
            rounds = rounds_of_buckets(buffer.plan, muon, replicas)
        planned.append(
            PlannedMatrices(rounds, buffer.of_expert, replicas, replica_rank, tp, tp_rank)
        )
    return planned


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
