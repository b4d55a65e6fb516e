"""Counts the bytes that one rank sends in a step, by axis and kind of collective.

Bytes are those of the tensors that a rank passes to its collectives: the whole tensor of
an all-reduce, a reduce-scatter or an all-to-all, its own part of an all-gather, what it
sends of a point-to-point message or of a hop in a ring. What it receives is counted
where it is sent. All parameters are assumed to be trained, and experts to be balanced.

Owns: exactly what the library sends between stages and once a step; what layers send is
in `layer_communication`. Pure. Must not know: torch, bandwidths, how a collective is
carried out.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from math import prod

from megatron_ray.commands import NUM_VOTES, num_marks
from megatron_ray.config.local_sgd import LocalSGDConfig
from megatron_ray.config.optimizer_kinds import state_names
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan, plan_pipeline
from megatron_ray.planning.buffers import (
    PlannedBuffer,
    PlannedMatrices,
    RankBuffers,
    distinct_buffers,
    gathered_width,
    is_fully_sharded,
    is_multiplied_in_fp8,
    planned_matrices,
    rank_buffers,
)
from megatron_ray.planning.layer_communication import stage_communication
from megatron_ray.planning.microbatch import (
    grad_width_of,
    hidden_width_of,
    num_microbatches,
    own_tokens_of,
)
from megatron_ray.planning.tally import Axis, Tally, group_sizes
from megatron_ray.sharding.buckets import PlacedParameter
from megatron_ray.sharding.matrices import tp_owners
from megatron_ray.sharding.parameter_types import LocalParameter, Part
from megatron_ray.sharding.row_shards import row_range

_FP32 = 4
_FP64 = 8
_WEIGHTS = "weights"


def step_communication(config: TrainConfig, rank: int) -> Tally | None:
    """Returns everything that a rank of a resolved config sends in one step.

    None under ZeRO-3, where torch gathers weights and scatters gradients by itself. What
    replica groups average after some steps is in `sync_communication`.
    """
    world = ParallelDims.of(config.parallel)
    dims = world.of_group
    rank = world.rank_in_group(rank)
    pipeline = plan_pipeline(config)
    if is_fully_sharded(config, dims):
        return None
    pp_rank = dims.coordinates(rank)["pp"]
    count = num_microbatches(config)
    tally = Tally(group_sizes(dims, config.parallel.replica_groups))
    for chunk, stage in enumerate(pipeline.stages_of(pp_rank)):
        tally.add_all(stage_communication(config, dims, stage), count)
        messages = count * _num_receivers(pipeline, pp_rank, chunk)
        tally.add("pp", "send", transfer_bytes(config), messages)
    buffers = rank_buffers(config, dims, pipeline, rank)
    tally.add_all(update_communication(config, dims, pipeline, buffers))
    tally.add_all(matrix_communication(dims, planned_matrices(config, dims, buffers)))
    return tally


def transfer_bytes(config: TrainConfig) -> int:
    """Returns the bytes of one message between stages."""
    return own_tokens_of(config) * config.model.hidden_size * hidden_width_of(config)


def _num_receivers(pipeline: PipelinePlan, pp_rank: int, chunk: int) -> int:
    """Returns the number of other ranks that a chunk sends to for each microbatch.

    Activations go to the next stage and gradients to the one before. In the V of zb-v
    two neighbouring stages can be on the same rank.
    """
    stages = pipeline.stages
    stage = stages.stage(pp_rank, chunk)
    receivers = 0
    for neighbour in (stage - 1, stage + 1):
        if (
            0 <= neighbour < stages.num_stages
            and stages.rank_and_chunk(neighbour)[0] != pp_rank
        ):
            receivers += 1
    return receivers


def update_communication(
    config: TrainConfig,
    dims: ParallelDims,
    pipeline: PipelinePlan,
    buffers: RankBuffers,
) -> Tally:
    """Returns what a rank sends once a step: gradients, weights and the step's numbers.

    What an optimizer of matrices sends is in `matrix_communication`.
    """
    tally = Tally(group_sizes(dims, config.parallel.replica_groups))
    for buffer in buffers.buffers:
        _add_buckets(tally, buffer, grad_width_of(config))
    _add_shared_gradients(tally, dims, buffers.buffers, grad_width_of(config))
    _add_expert_biases(tally, config, dims, pipeline, buffers.pp_rank)
    _add_delayed_scales(tally, config, dims, buffers.table)
    # One all-reduce in fp64: loss, tokens and squared gradient norm, the auxiliary
    # losses, the votes, and a bit for each rank where own gradients are checked.
    numbers = 3 + len(config.model.aux_losses) + NUM_VOTES
    if config.training.checks_own_gradients:
        numbers += num_marks(dims.world_size)
    tally.add("world", "all_reduce", _FP64 * numbers)
    tally.add("sync", "all_reduce", _FP64 * numbers)
    return tally


def gather_communication(
    config: TrainConfig, dims: ParallelDims, buffers: RankBuffers
) -> Tally:
    """Returns what a rank sends while ZeRO-3 gathers each weight once.

    Those are as many rows as the rank with most of them has. How often torch gathers a
    weight depends on the order of forward and backward passes.
    """
    tally = Tally(group_sizes(dims))
    num_bytes: dict[tuple[Axis, str], int] = {}
    for parameter in buffers.table:
        axis: Axis = "edp" if parameter.of_expert else "shard"
        _, most_rows = row_range(parameter.shape[0], 0, tally.sizes[axis])
        size = most_rows * prod(parameter.shape[1:]) * gathered_width(config, parameter)
        unit = (axis, _unit_of(parameter))
        num_bytes[unit] = num_bytes.get(unit, 0) + size
    for (axis, _), size in num_bytes.items():
        tally.add(axis, "all_gather", size)
    return tally


def _unit_of(parameter: LocalParameter) -> str:
    """Returns what is gathered with a parameter: its layer, or all outside of layers."""
    kind, index, *_ = parameter.name.split(".")
    if kind in ("layers", "mtp"):
        return f"{kind}.{index}"
    return "model"


def gather_scale_communication(
    config: TrainConfig, dims: ParallelDims, buffers: RankBuffers
) -> Tally:
    """Returns what a rank sends once a step for the scales of weights gathered in FP8."""
    tally = Tally(group_sizes(dims))
    dense = 0
    of_experts = 0
    for parameter in buffers.table:
        is_multiplied = is_multiplied_in_fp8(config, parameter)
        if not config.training.gathers_in_fp8 or not is_multiplied:
            continue
        if config.model.moe is not None and parameter.of_expert:
            of_experts += config.model.moe.num_experts // dims.ep
        else:
            dense += 1
    tally.add("shard", "all_reduce", _FP32 * dense)
    tally.add("tp", "all_reduce", _FP32 * dense)
    tally.add("edp", "all_reduce", _FP32 * of_experts)
    tally.add("etp", "all_reduce", _FP32 * of_experts)
    return tally


def sync_communication(config: TrainConfig, rank: int, step: int) -> Tally:
    """Returns what a rank sends to other replica groups after a step, from 1: means.

    Weights and moments are averaged in fp32. The step's numbers are in
    `step_communication`.
    """
    world = ParallelDims.of(config.parallel)
    dims = world.of_group
    tally = Tally(group_sizes(dims, config.parallel.sync_groups))
    local_sgd = config.parallel.local_sgd
    if local_sgd is None:
        return tally
    is_last = step == config.training.steps
    buffers = rank_buffers(config, dims, plan_pipeline(config), world.rank_in_group(rank))
    for (fragment, name), elements in _synced_elements(config, local_sgd, buffers).items():
        every = _sync_period(local_sgd, name)
        is_due = every is not None and local_sgd.is_due(step, every, fragment)
        if is_due or (is_last and name == _WEIGHTS):
            tally.add("sync", "all_reduce", _FP32 * elements)
    return tally


def mean_sync_bytes(config: TrainConfig, buffers: RankBuffers) -> float:
    """Returns the bytes of `sync_communication` per step, on average over many steps."""
    local_sgd = config.parallel.local_sgd
    if local_sgd is None:
        return 0.0
    mean = 0.0
    for (_, name), elements in _synced_elements(config, local_sgd, buffers).items():
        every = _sync_period(local_sgd, name)
        if every is not None:
            mean += _FP32 * elements / every
    return mean


def most_mean_sync_bytes(config: TrainConfig) -> float:
    """Returns the `mean_sync_bytes` of the rank with most of them."""
    dims = ParallelDims.of(config.parallel).of_group
    ranks = distinct_buffers(config, dims, plan_pipeline(config))
    return max(map(partial(mean_sync_bytes, config), ranks))


def most_kept_bytes(config: TrainConfig) -> int:
    """Returns the `kept_mean_bytes` of the rank with most of them."""
    dims = ParallelDims.of(config.parallel).of_group
    ranks = distinct_buffers(config, dims, plan_pipeline(config))
    return max(map(partial(kept_mean_bytes, config), ranks))


def kept_mean_bytes(config: TrainConfig, buffers: RankBuffers) -> int:
    """Returns the bytes of all means of a rank when all of them are due after one step.

    With `rendezvous` they are kept at once, where the optimizer's state is.
    """
    local_sgd = config.parallel.local_sgd
    if local_sgd is None:
        return 0
    num_bytes = 0
    for (_, name), elements in _synced_elements(config, local_sgd, buffers).items():
        if _sync_period(local_sgd, name) is not None:
            num_bytes += _FP32 * elements
    return num_bytes


def _sync_period(local_sgd: LocalSGDConfig, name: str) -> int | None:
    """Returns the steps between means of the weights, or of a moment."""
    if name == _WEIGHTS:
        return local_sgd.sync_every
    return local_sgd.sync_moments_every.get(name)


def _synced_elements(
    config: TrainConfig, local_sgd: LocalSGDConfig, buffers: RankBuffers
) -> dict[tuple[int, str], int]:
    """Returns how many elements a rank averages, by fragment and name of what."""
    elements: dict[tuple[int, str], int] = {}
    for buffer in buffers.buffers:
        for placed, part, start, end in _parts(buffer):
            fragment = local_sgd.fragment_of(placed.parameter.parts[0].logical.name)
            moments = state_names(config.optimizer, of_matrix=part.logical.is_matrix)
            owned = buffer.owned(start, end)
            for name in (_WEIGHTS, *moments):
                key = (fragment, name)
                elements[key] = elements.get(key, 0) + owned
    return elements


def _parts(
    buffer: PlannedBuffer,
) -> Iterator[tuple[PlacedParameter, Part, int, int]]:
    """Yields the parts of trainable parameters with their ranges, without gaps after them."""
    for bucket in buffer.plan.buckets:
        for placed in bucket.placed:
            parts = placed.parameter.parts
            starts = [placed.part_start(part) for part in parts]
            ends = [*starts[1:], placed.end]
            for part, start, end in zip(parts, starts, ends, strict=True):
                yield placed, part, start, end


def _add_buckets(tally: Tally, buffer: PlannedBuffer, grad_width: int) -> None:
    """Adds the reduction of gradients and, under ZeRO-1, gathering of weights."""
    axis: Axis = "edp" if buffer.of_expert else "dp"
    for bucket in buffer.plan.buckets:
        size = bucket.end - bucket.start
        if buffer.sharded:
            tally.add(axis, "reduce_scatter", grad_width * size)
            tally.add(axis, "all_gather", buffer.width * size // buffer.replicas)
        else:
            tally.add(axis, "all_reduce", grad_width * size)


def matrix_communication(dims: ParallelDims, matrices: Iterable[PlannedMatrices]) -> Tally:
    """Returns what a rank sends for the update of whole matrices."""
    tally = Tally(group_sizes(dims))
    for entry in matrices:
        _add_matrices(tally, entry)
    return tally


def _add_matrices(tally: Tally, matrices: PlannedMatrices) -> None:
    """Adds the fp32 ranges that make matrices whole, and what is returned of them."""
    axis: Axis = "dp"
    tp_axis: Axis = "tp"
    if matrices.of_expert:
        axis = "edp"
        tp_axis = "etp"
    for round_ in matrices.rounds:
        ranges = 0
        owned = 0
        own_parts = 0
        sharded = []
        for entry in round_:
            share = entry.share_of(matrices.replica_rank)
            if share is not None:
                ranges += share.num_elements
            if entry.owner == matrices.replica_rank:
                owned += entry.matrix.num_elements
                if entry.matrix.is_sharded:
                    sharded.append(entry.matrix)
                    own_parts += entry.matrix.num_elements
        if matrices.replicas > 1:
            tally.add(axis, "all_to_all", _FP32 * ranges)
            tally.add(axis, "all_to_all", _FP32 * owned)
        tally.add(tp_axis, "all_to_all", _FP32 * own_parts)
        owners = tp_owners(sharded, matrices.tp)
        returned = 0
        for matrix, owner in zip(sharded, owners, strict=True):
            if owner == matrices.tp_rank:
                returned += matrix.num_elements
        tally.add(tp_axis, "all_to_all", _FP32 * returned * matrices.tp)


def _add_shared_gradients(
    tally: Tally, dims: ParallelDims, buffers: Sequence[PlannedBuffer], width: int
) -> None:
    """Adds gradients of parameters that other ranks than the replicas hold too.

    A rank sends those elements that it updates.
    """
    summed_over_tp = 0
    replicated_heads = 0
    num_kv_replicas = 0
    for buffer in buffers:
        for bucket in buffer.plan.buckets:
            for placed in bucket.placed:
                parameter = placed.parameter
                owned = buffer.owned(placed.start, placed.end)
                # Norms and biases that each tp rank applies to its own tokens.
                if parameter.sum_over_tp:
                    summed_over_tp += owned
                # Tied word embeddings of the first and the last stage.
                if parameter.is_shared_embedding:
                    tally.add("embedding", "all_reduce", width * owned)
                for part in parameter.parts:
                    if part.num_kv_replicas > 1:
                        start = placed.part_start(part)
                        end = start + part.box.num_elements
                        replicated_heads += buffer.owned(start, end)
                        num_kv_replicas = part.num_kv_replicas
    tally.add("tp", "all_reduce", width * summed_over_tp)
    # Replicas of one key/value head are summed with the others in one all-reduce over
    # tp, which has a row for each distinct head.
    distinct = 1
    if num_kv_replicas:
        distinct = dims.tp // num_kv_replicas
    tally.add("tp", "all_reduce", width * replicated_heads * distinct)


def _add_expert_biases(
    tally: Tally,
    config: TrainConfig,
    dims: ParallelDims,
    pipeline: PipelinePlan,
    pp_rank: int,
) -> None:
    """Adds the tokens per expert that the balancing biases are updated by, fp32."""
    model = config.model
    num_biases = 0
    for stage in pipeline.stages_of(pp_rank):
        for layer in (*stage.layers, *stage.mtp_layer_numbers(model.num_layers)):
            moe = model.experts_on(layer)
            if moe is not None and moe.expert_bias:
                num_biases += moe.num_experts
    tally.add("tokens", "all_reduce", _FP32 * num_biases)
    if dims.dp > 1:
        tally.add("dp", "all_reduce", _FP32 * num_biases)


def _add_delayed_scales(
    tally: Tally,
    config: TrainConfig,
    dims: ParallelDims,
    table: Iterable[LocalParameter],
) -> None:
    """Adds the largest values that delayed scaling keeps of three operands, fp32."""
    fp8 = config.training.fp8
    if fp8 is None or fp8.recipe != "delayed":
        return
    count = sum(is_multiplied_in_fp8(config, parameter) for parameter in table)
    tally.add("tokens", "all_reduce", 3 * _FP32 * count)
    if dims.dp > 1:
        tally.add("dp", "all_reduce", 3 * _FP32 * count)
