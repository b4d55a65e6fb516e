"""From a config and a mesh to a model on this rank, its buffers and its gradient path.

Owns: the order of assembly.

The only place that sees both the model and the layout. Must not know: the optimizer's
arithmetic, data, the loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.context_parallel.all_gather import AllGatherAttention
from megatron_ray.context_parallel.all_to_all import UlyssesAttention
from megatron_ray.context_parallel.ring import RingAttention
from megatron_ray.data_parallel.buffers import (
    FlatBuffers,
    GradReducer,
    ParameterGroup,
    attach_slots,
    bind_parameters,
)
from megatron_ray.data_parallel.full_shard import FullShard, Shards, TorchReducer
from megatron_ray.distributed import collectives
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.distributed.rng import Streams
from megatron_ray.expert_parallel.layers import ExpertBias
from megatron_ray.models.attention import LocalAttention
from megatron_ray.models.aux_loss import AuxLoss
from megatron_ray.models.gpt import GPT
from megatron_ray.models.moe.experts import GatedExperts, PlainExperts
from megatron_ray.ops.weight_grad import WeightGradSink
from megatron_ray.parallelize.compile import apply_compile, compiled_ops
from megatron_ray.parallelize.parallel_layers import (
    ExpertParallelGroups,
    ParallelLayerFactory,
)
from megatron_ray.parallelize.recompute import apply_recompute
from megatron_ray.pipeline_parallel.schedules.actions import Order
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan, plan_pipeline
from megatron_ray.sharding.buckets import Bucket, plan_buckets
from megatron_ray.sharding.parameters import LocalParameter, freeze, local_parameters
from megatron_ray.sharding.row_shards import shard_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ParallelModel:
    """This rank's model with everything that its gradients flow through."""

    module: GPT
    parameters: tuple[LocalParameter, ...]
    families: tuple[ParameterGroup, ...]
    """The dense parameters, then the experts where there are any."""
    expert_biases: dict[str, ExpertBias]
    """By logical name."""
    aux_losses: dict[str, list[AuxLoss]]
    """This rank's places of every kind there is, the same kinds in the same order on
    all ranks."""
    sink: WeightGradSink
    pipeline: PipelinePlan
    actions: Order
    """This rank's list for a step; empty where there is one stage only."""
    sequence_parallel: bool
    dtype: torch.dtype
    """Of activations; under ZeRO-3 not that of the buffers, whose fp32 weights are
    gathered in this type."""

    @property
    def has_loss(self) -> bool:
        """Whether the last stage is here."""
        return self.module.has_head

    def begin_step(self) -> None:
        """Forgets the last step's gradients."""
        self.sink.begin_step()
        for family in self.families:
            family.reducer.begin_step(set(self.sink.slots))


def build_model(
    config: ModelConfig,
    mesh: ParallelMesh,
    parallel: ParallelismConfig,
    *,
    dtype: torch.dtype,
    held: Sequence[StageContents] | None = None,
    seed: int = 0,
) -> GPT:
    """The rank's part of the model (`held`: its pipeline stages) on device `meta`:
    nothing is allocated yet. `seed` is dropout's.
    """
    layers = ParallelLayerFactory(
        config,
        mesh.tp_group,
        mesh.dims.tp,
        sequence_parallel=parallel.sequence_parallel,
        dtype=dtype,
        experts=ExpertParallelGroups(
            mesh.ep_group, mesh.etp_group, mesh.token_group, parallel.dispatcher
        ),
        attention=lambda window: context_attention(parallel.cp_method, mesh, window),
        streams=Streams(seed, {"tp": mesh.tp_rank, "cp": mesh.cp_rank}),
    )
    with torch.device("meta"):
        return GPT(config, layers, held)


def context_attention(
    method: str, mesh: ParallelMesh, window: int | None = None
) -> nn.Module:
    """Attention over sequences, or the last `window` tokens of them, that
    context-parallel ranks share, or that lie whole on this one.
    """
    if mesh.cp_group is None:
        return LocalAttention(window)
    if method == "p2p":
        return RingAttention(mesh.cp_group, window)
    if method == "all_gather":
        return AllGatherAttention(mesh.cp_group, window)
    if method == "a2a":
        return UlyssesAttention(mesh.cp_group, LocalAttention(window))
    exchange, ring = mesh.cp_levels
    return UlyssesAttention(exchange, RingAttention(ring, window))


def parallelize(
    config: TrainConfig,
    mesh: ParallelMesh,
    *,
    on_reduce: Callable[[Bucket], None] | None = None,
) -> ParallelModel:
    """Builds the model, places its parameters in flat buffers (zeros) and wires
    gradients to the buckets.

    `on_reduce` hears of every bucket whose reduction starts (tests and traces).
    """
    parallel = config.parallel
    dtype = DTYPES[config.training.precision]
    pipeline = plan_pipeline(config)
    held = pipeline.held(mesh.pp_rank)
    fully_sharded = parallel.zero == 3 and mesh.shard_group is not None
    held_type = torch.float32 if fully_sharded else dtype
    module = build_model(
        config.model, mesh, parallel, dtype=held_type, held=held, seed=config.training.seed
    )
    if config.training.compile == "blocks":
        apply_compile(module, compiled_ops())
    apply_recompute(module, config.training.recompute)
    table = local_parameters(
        config.model,
        mesh.dims,
        mesh.rank,
        sequence_parallel=parallel.sequence_parallel,
        held=held,
    )
    table = freeze(table, config.optimizer.freeze)
    for local in table:
        module.get_parameter(local.name).requires_grad_(local.trainable)
    num_microbatches = config.training.global_batch_size // (
        config.training.micro_batch_size * mesh.dims.dp
    )
    actions = (
        pipeline.training_actions(num_microbatches, mesh.pp_rank)
        if pipeline.stages.num_stages > 1
        else []
    )
    if fully_sharded:
        table, families = _fully_sharded(config, mesh, module, table)
        sink = WeightGradSink(families[0].reducer.ready)
    else:
        families = _families(config, mesh, table, on_reduce)
        bind_parameters(module, _views(families, _weights))
        reducers = {
            name: family.reducer
            for family in families
            for name in family.buffers.views(family.buffers.gradients)
        }
        sink = WeightGradSink(lambda slot: reducers[slot.name].ready(slot))
        attach_slots(module, _views(families, _gradients), sink)
    biases = allocate_expert_biases(module, mesh.device)
    kinds = config.model.aux_losses
    losses = {
        kind: [
            part
            for part in module.modules()
            if isinstance(part, AuxLoss) and part.kind == kind
        ]
        for kind in kinds
    }
    return ParallelModel(
        module,
        table,
        families,
        biases,
        losses,
        sink,
        pipeline,
        actions,
        parallel.sequence_parallel,
        dtype,
    )


def allocate_expert_biases(module: GPT, device: torch.device) -> dict[str, ExpertBias]:
    """The model's balancing biases by logical name, zero in real memory."""
    found = {
        name: part for name, part in module.named_modules() if isinstance(part, ExpertBias)
    }
    for bias in found.values():
        bias.allocate(device)
    return found


def _families(
    config: TrainConfig,
    mesh: ParallelMesh,
    table: Sequence[LocalParameter],
    on_reduce: Callable[[Bucket], None] | None,
) -> tuple[ParameterGroup, ...]:
    """Flat buffers (zeros) of the dense parameters and of the experts, each with the
    reduction over its own replicas.
    """
    found = []
    for of_expert, group in (
        (False, mesh.replica_group),
        (True, mesh.expert_replica_group),
    ):
        parameters = [parameter for parameter in table if parameter.of_expert == of_expert]
        if of_expert and not parameters:
            continue
        plan = plan_buckets(
            parameters, collectives.size(group), config.parallel.bucket_elements
        )
        buffers = FlatBuffers.allocate(plan, DTYPES[config.training.precision], mesh.device)
        reducer = GradReducer(
            buffers, group, sharded=config.parallel.zero == 1, on_start=on_reduce
        )
        found.append(ParameterGroup(buffers, reducer, group))
    return tuple(found)


def _fully_sharded(
    config: TrainConfig, mesh: ParallelMesh, module: GPT, table: Sequence[LocalParameter]
) -> tuple[tuple[LocalParameter, ...], tuple[ParameterGroup, ...]]:
    """This rank's rows, and both families as torch's fully_shard cuts them: dense
    parameters over dp x cp, or a part of it where there are copies, experts over edp.
    """
    experts = [
        part for part in module.modules() if isinstance(part, GatedExperts | PlainExperts)
    ]
    dense = Shards(
        [*module.layers.values(), *module.mtp.values(), module],
        mesh.shard_group,
        mesh.copy_group,
    )
    of_experts = Shards(experts, mesh.expert_replica_group)
    shards = FullShard(module, [of_experts, dense], DTYPES[config.training.precision])
    families = list[ParameterGroup]()
    found = list[LocalParameter]()
    for of_expert, part in ((False, dense), (True, of_experts)):
        if of_expert and not experts:
            continue
        mine = [parameter for parameter in table if parameter.of_expert == of_expert]
        rows = shard_rows(mine, collectives.rank(part.group), collectives.size(part.group))
        found += rows
        buffers = FlatBuffers.allocate(
            plan_buckets(rows, 1, config.parallel.bucket_elements),
            torch.float32,
            mesh.device,
        )
        adopt = shards.adopt if not of_expert else lambda: None
        families.append(ParameterGroup(buffers, TorchReducer(buffers), part.copies, adopt))
    weights, gradients = (_views(families, choose) for choose in (_weights, _gradients))
    shards.attach(weights, gradients, mesh.device)
    return tuple(found), tuple(families)


def _weights(buffers: FlatBuffers) -> Tensor:
    return buffers.parameters


def _gradients(buffers: FlatBuffers) -> Tensor:
    return buffers.gradients


def _views(
    families: Sequence[ParameterGroup], choose: Callable[[FlatBuffers], Tensor]
) -> dict[str, Tensor]:
    return {
        name: view
        for family in families
        for name, view in family.buffers.views(choose(family.buffers)).items()
    }
