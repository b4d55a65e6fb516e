"""Places a rank's parameters and gradients in memory.

Either unsharded in flat buffers, with the model's parameters as views (ZeRO-0 and 1),
or as shards under torch's fully_shard (ZeRO-3). Both return a `ParameterStorage`. Must
not know: the model's config, the order of assembly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from megatron_ray.data_parallel.buffers import (
    FlatBuffers,
    GradReducer,
    OnReduce,
    ParameterGroup,
    Reducer,
    RowShards,
    attach_slots,
    bind_parameters,
    buffer_views,
)
from megatron_ray.data_parallel.fp8_shards import Fp8Shards, WeightRows
from megatron_ray.data_parallel.full_shard import FullShard, Shards, TorchReducer
from megatron_ray.data_parallel.weight_gathers import WeightGathers, wait_in_forward
from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.gpt import GPT
from megatron_ray.models.moe.experts import GatedExperts, PlainExperts
from megatron_ray.ops.weight_grad import GradSlot, WeightGradSink
from megatron_ray.sharding.buckets import plan_buckets
from megatron_ray.sharding.parameter_types import LocalParameter
from megatron_ray.sharding.row_shards import row_range, shard_rows


@dataclass(frozen=True)
class ParameterStorage:
    """A rank's parameters and gradients in memory."""

    parameters: tuple[LocalParameter, ...]
    """Parameters in the buffers; under ZeRO-3 the rank's rows of the table's
    tensors."""
    groups: tuple[ParameterGroup, ...]
    """The dense parameters, then those of experts where there are any."""
    uses_slots: bool
    """Whether gradients are accumulated in slots; otherwise by autograd."""


@dataclass(frozen=True)
class StorageOptions:
    """Options of the layout and reduction of buffers."""

    dtype: torch.dtype
    """Type of weights in the forward pass."""
    grad_dtype: torch.dtype
    """Type in which gradients are reduced, and added up except under ZeRO-3."""
    bucket_elements: int | None
    """None: by the size of the model."""
    shards_gradients: bool
    """ZeRO-1: each replica receives the sum of its own part only."""
    overlaps_gathers: bool = False
    """ZeRO-1: the next forward pass waits for updated weights, layer by layer."""
    on_reduce: OnReduce | None = None
    checks_gradients: bool = False
    """Whether each rank's gradients are checked before they are reduced."""
    fp8_scales: Mapping[str, int] = field(default_factory=dict)
    """ZeRO-3: the weights that are gathered in FP8, by name -> number of their scales."""


def place_in_buffers(
    module: GPT,
    table: Sequence[LocalParameter],
    mesh: ParallelMesh,
    options: StorageOptions,
) -> ParameterStorage:
    """Makes the model's parameters views of flat buffers (zeros), one pair per group."""
    dense, experts = _split(table)
    group = _reduced_group(dense, mesh.replica_group, mesh.device, options)
    groups = [replace(group, tp_group=mesh.tp_group)]
    if experts:
        group = _reduced_group(experts, mesh.expert_replica_group, mesh.device, options)
        groups.append(replace(group, tp_group=mesh.etp_group))
    bind_parameters(module, buffer_views(groups, _weights))
    for group in groups:
        if group.gathers is not None:
            wait_in_forward(module, group.buffers.plan, group.gathers)
    return ParameterStorage(tuple(table), tuple(groups), uses_slots=True)


def _reduced_group(
    parameters: Sequence[LocalParameter],
    group: Group,
    device: torch.device,
    options: StorageOptions,
) -> ParameterGroup:
    plan = plan_buckets(parameters, collectives.size(group), options.bucket_elements)
    buffers = FlatBuffers.allocate(plan, options.dtype, device, options.grad_dtype)
    reducer = GradReducer(
        buffers,
        group,
        sharded=options.shards_gradients,
        on_start=options.on_reduce,
        checks=options.checks_gradients,
    )
    gathers = None
    if options.overlaps_gathers and group is not None:
        gathers = WeightGathers()
    return ParameterGroup(buffers, reducer, group, gathers=gathers)


def shard_fully(
    module: GPT,
    table: Sequence[LocalParameter],
    mesh: ParallelMesh,
    options: StorageOptions,
) -> ParameterStorage:
    """Shards the model's parameters over its replicas and stores shards in buffers.

    Dense parameters are sharded over dp x cp, or a part of it with several copies,
    those of experts over edp. The module must be fp32, the type of the shards.
    """
    # Wrapping shards the (meta) parameters; afterwards torch's shapes can be compared with
    # the table's rows, and memory can be attached.
    shards = _wrap(module, mesh, options)
    groups = []
    parameters: list[LocalParameter] = []
    weights: dict[str, Tensor] = {}
    dense, experts = _split(table)
    for part, tensors, tp_group in (
        (shards.dense, dense, mesh.tp_group),
        (shards.experts, experts, mesh.etp_group),
    ):
        if not part.modules:
            continue
        sharded = RowShards(tuple(tensors), part.group)
        rows = shard_rows(
            tensors, collectives.rank(part.group), collectives.size(part.group)
        )
        parameters.extend(rows)
        # Buffers of shards belong to this rank only, like those of a single replica.
        plan = plan_buckets(rows, 1, options.bucket_elements)
        buffers = FlatBuffers.allocate(plan, torch.float32, mesh.device)
        views = buffers.views(buffers.parameters)
        fp8 = _shards_in_fp8(sharded, views, tp_group, options, mesh.device)
        weights |= views | fp8.shards()
        groups.append(
            ParameterGroup(
                buffers,
                TorchReducer(buffers),
                part.copies,
                sync_model=partial(_sync_model, shards.model, tuple(views), fp8),
                tp_group=tp_group,
                rows=sharded,
            )
        )
    shards.model.attach(weights, buffer_views(groups, _gradients), mesh.device)
    return ParameterStorage(tuple(parameters), tuple(groups), uses_slots=False)


def _shards_in_fp8(
    sharded: RowShards,
    views: Mapping[str, Tensor],
    tp_group: Group,
    options: StorageOptions,
    device: torch.device,
) -> Fp8Shards:
    """Returns the rows of weights that are gathered in FP8."""
    shards = collectives.size(sharded.group)
    rank = collectives.rank(sharded.group)
    weights = {}
    for parameter in sharded.table:
        name = parameter.name
        if name not in options.fp8_scales:
            continue
        num_rows, width = parameter.shape
        # A rank may have none of the rows.
        rows = views.get(name, torch.zeros(0, width, device=device))
        start, _ = row_range(num_rows, rank, shards)
        _, most = row_range(num_rows, 0, shards)
        weights[name] = WeightRows(rows, start, num_rows, most, options.fp8_scales[name])
    return Fp8Shards(weights, (sharded.group, tp_group), options.dtype, device)


def _sync_model(model: FullShard, names: Sequence[str], fp8: Fp8Shards) -> None:
    model.sync_model(names)
    fp8.update_scales()


@dataclass(frozen=True)
class _WrappedModel:
    model: FullShard
    dense: Shards
    experts: Shards


def _wrap(module: GPT, mesh: ParallelMesh, options: StorageOptions) -> _WrappedModel:
    expert_modules: list[nn.Module] = []
    for part in module.modules():
        if isinstance(part, GatedExperts | PlainExperts):
            expert_modules.append(part)
    experts = Shards(expert_modules, mesh.expert_replica_group)
    # One unit per block, and one for the rest of the model.
    units = [*module.layers.values(), *module.mtp.values(), module]
    dense = Shards(units, mesh.shard_group, mesh.copy_group)
    # Experts are inside blocks, so they are wrapped first.
    model = FullShard(
        module,
        [experts, dense],
        options.dtype,
        options.grad_dtype,
        in_fp8=options.fp8_scales.keys(),
    )
    return _WrappedModel(model, dense, experts)


def attach_grad_slots(module: GPT, storage: ParameterStorage) -> WeightGradSink:
    """Connects the layers' weight gradients to the storage; returns the sink."""
    reducers: dict[str, Reducer] = {}
    for group in storage.groups:
        for placed in group.buffers.plan.placed:
            reducers[placed.parameter.name] = group.reducer
    # Dense parameters and experts are reduced over different replicas.
    sink = WeightGradSink(partial(_pass_on, reducers))
    if storage.uses_slots:
        attach_slots(module, buffer_views(storage.groups, _gradients), sink)
    return sink


def _pass_on(reducers: dict[str, Reducer], slot: GradSlot) -> None:
    reducers[slot.name].ready(slot)


def _split(
    table: Sequence[LocalParameter],
) -> tuple[list[LocalParameter], list[LocalParameter]]:
    """Returns the dense parameters and those of experts."""
    dense = []
    experts = []
    for parameter in table:
        if parameter.of_expert:
            experts.append(parameter)
        else:
            dense.append(parameter)
    return dense, experts


def _weights(buffers: FlatBuffers) -> Tensor:
    return buffers.parameters


def _gradients(buffers: FlatBuffers) -> Tensor:
    return buffers.gradients
