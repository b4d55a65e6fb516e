"""Builds this rank's model from a config and a mesh, with buffers and gradients.

Owns: the order of assembly; the only module that knows both model and layout. Must not
know: the optimizer's arithmetic, data, the loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.parallelism import ParallelismConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.context_parallel.all_gather import AllGatherAttention
from megatron_ray.context_parallel.all_to_all import UlyssesAttention
from megatron_ray.context_parallel.ring import RingAttention
from megatron_ray.data_parallel.buffers import OnReduce, ParameterGroup
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.distributed.rng import Streams
from megatron_ray.expert_parallel.layers import ExpertBias, update_expert_biases
from megatron_ray.models.attention import LocalAttention
from megatron_ray.models.aux_loss import AuxLoss
from megatron_ray.models.gpt import GPT
from megatron_ray.ops.fp8.delayed import DelayedScaling
from megatron_ray.ops.weight_grad import WeightGradSink
from megatron_ray.parallelize.compile import apply_compile, compiled_ops
from megatron_ray.parallelize.fp8 import apply_fp8, scales_of_gathers
from megatron_ray.parallelize.parallel_layers import (
    ExpertParallelGroups,
    ParallelLayerFactory,
)
from megatron_ray.parallelize.recompute import apply_recompute
from megatron_ray.parallelize.storage import (
    ParameterStorage,
    StorageOptions,
    attach_grad_slots,
    place_in_buffers,
    shard_fully,
)
from megatron_ray.parallelize.token_overlap import token_overlap
from megatron_ray.parallelize.transformer_engine.apply import apply_transformer_engine
from megatron_ray.parallelize.transformer_engine.library import load_transformer_engine
from megatron_ray.pipeline_parallel.schedules.actions import Order
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan, plan_pipeline
from megatron_ray.sharding.layer_specs import ShardPosition
from megatron_ray.sharding.parameter_types import LocalParameter
from megatron_ray.sharding.parameters import freeze, local_parameters
from megatron_ray.tensor_parallel.cross_entropy import VocabParallelHead
from megatron_ray.tensor_parallel.group import TensorParallel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ParallelModel:
    """This rank's model with its gradient buffers and reductions."""

    module: GPT
    storage: ParameterStorage
    sink: WeightGradSink
    expert_biases: dict[str, ExpertBias]
    """Biases by logical name."""
    aux_losses: dict[str, list[AuxLoss]]
    """This rank's modules of each kind of loss in the model; the kinds are the same, in
    the same order, on all ranks."""
    pipeline: PipelinePlan
    actions: Callable[[int], Order]
    """Returns this rank's actions of a step with so many microbatches."""
    sequence_parallel: bool
    delayed_scaling: DelayedScaling | None
    """The scales of layers that multiply in FP8 with recipe=delayed."""
    dtype: torch.dtype
    """Type of activations. Under ZeRO-3 the buffers are fp32, and weights are gathered
    in this type."""
    hidden_dtype: torch.dtype
    """Type of hidden states between blocks, and so between stages."""

    @property
    def parameters(self) -> tuple[LocalParameter, ...]:
        """Parameters in this rank's buffers."""
        return self.storage.parameters

    @property
    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """The dense parameters, then those of experts, if any."""
        return self.storage.groups

    @property
    def has_schedule(self) -> bool:
        """Whether passes follow a schedule's actions, not one microbatch after another."""
        return self.pipeline.stages.num_stages > 1 or self.pipeline.in_pairs

    @property
    def has_loss(self) -> bool:
        """Whether the last stage is on this rank."""
        return self.module.has_head

    def scale_losses(self, factor: Callable[[], Tensor]) -> None:
        """Multiplies the gradients of all losses by `factor()` from now on.

        The losses themselves stay as they are. The factor, an fp32 scalar on the device,
        must not change within a step.
        """
        for part in self.module.modules():
            if isinstance(part, AuxLoss | VocabParallelHead):
                part.grad_scale = factor

    def begin_step(self) -> None:
        """Resets the state of the previous step."""
        self.sink.begin_step()
        trainable = set(self.sink.slots)
        for group in self.parameter_groups:
            group.reducer.begin_step(trainable)
        if self.delayed_scaling is not None:
            self.delayed_scaling.begin_step()

    def finish_reductions(self) -> None:
        """Waits for the buckets' gradients."""
        for group in self.parameter_groups:
            group.reducer.finish()

    def not_finite_gradients(self) -> Tensor | None:
        """Whether this rank's own gradients are not finite; None if that is not checked."""
        result: Tensor | None = None
        for group in self.parameter_groups:
            own = group.reducer.not_finite
            if own is not None:
                result = own if result is None else result | own
        return result

    def update_expert_biases(self, mesh: ParallelMesh, skip: Tensor | None) -> None:
        """Updates the biases of experts, unless `skip` is 1.

        A bias has no gradient, but depends on the tokens of all ranks in this step.
        """
        update_expert_biases(
            self.expert_biases.values(), mesh.token_group, mesh.dp_group, skip
        )

    def update_scales(self, mesh: ParallelMesh, skip: Tensor | None) -> None:
        """Makes the FP8 scales of the next step, unless `skip` is 1."""
        if self.delayed_scaling is not None:
            self.delayed_scaling.update((mesh.token_group, mesh.dp_group), skip)


def parallelize(
    config: TrainConfig, mesh: ParallelMesh, *, on_reduce: OnReduce | None = None
) -> ParallelModel:
    """Builds this rank's model in flat buffers (zeros) and wires its gradients to them.

    `on_reduce` is called with each bucket when its reduction starts, for tests and
    traces.
    """
    parallel = config.parallel
    training = config.training
    pipeline = plan_pipeline(config)
    stages = pipeline.stages_of(mesh.pp_rank)
    dtype = DTYPES[training.precision]
    # Fully sharded weights are stored in fp32 and gathered in the type of the model.
    is_fully_sharded = parallel.zero == 3 and mesh.shard_group is not None
    weight_dtype = dtype
    if is_fully_sharded:
        weight_dtype = torch.float32

    # On device meta, so that nothing is allocated before the weights are placed.
    module = build_model(
        config.model, mesh, parallel, dtype=weight_dtype, stages=stages, seed=training.seed
    )
    hidden_dtype = dtype
    if training.fp32_residual_connection:
        hidden_dtype = torch.float32
        module.activation_dtype = dtype
    if config.model.spec == "transformer_engine":
        apply_transformer_engine(
            module,
            training.fp8,
            load_transformer_engine(mesh.device_kind, training.fp8),
        )
    if training.compile == "blocks":
        apply_compile(module, compiled_ops())
    apply_recompute(module, training.recompute)

    # Frozen parameters stay in the table and in the buffers, but have no gradients.
    table = freeze(_parameter_table(config, mesh, stages), config.optimizer.freeze)
    _require_grads(module, table)

    options = StorageOptions(
        dtype,
        DTYPES[training.grad_precision],
        parallel.bucket_elements,
        shards_gradients=parallel.zero == 1,
        overlaps_gathers=parallel.overlap_param_gather,
        on_reduce=on_reduce,
        checks_gradients=training.checks_own_gradients,
        fp8_scales=scales_of_gathers(module, training.fp8),
    )
    if is_fully_sharded:
        storage = shard_fully(module, table, mesh, options)
    else:
        storage = place_in_buffers(module, table, mesh, options)
    return ParallelModel(
        module=module,
        storage=storage,
        sink=attach_grad_slots(module, storage),
        expert_biases=allocate_expert_biases(module, mesh.device),
        aux_losses=_aux_losses(module, config.model),
        delayed_scaling=apply_fp8(module, training.fp8, mesh),
        pipeline=pipeline,
        # The number of microbatches hardly ever changes from one step to the next.
        actions=lru_cache(maxsize=1)(
            partial(pipeline.training_actions, pp_rank=mesh.pp_rank)
        ),
        sequence_parallel=parallel.sequence_parallel,
        dtype=dtype,
        hidden_dtype=hidden_dtype,
    )


def build_model(
    config: ModelConfig,
    mesh: ParallelMesh,
    parallel: ParallelismConfig,
    *,
    dtype: torch.dtype,
    stages: Sequence[StageContents] | None = None,
    seed: int = 0,
) -> GPT:
    """Builds the rank's part of the model on device `meta`, without memory.

    `stages`: its pipeline stages, by default all; `seed`: seed of dropout.
    """
    # Only the factory knows the layout.
    sequence_parallel = parallel.sequence_parallel
    layers = ParallelLayerFactory(
        config,
        ShardPosition.of_rank(
            mesh.dims.of_group,
            mesh.dims.rank_in_group(mesh.rank),
            sequence_parallel=sequence_parallel,
        ),
        TensorParallel.of_group(
            mesh.tp_group,
            sequence_parallel=sequence_parallel,
            overlap=token_overlap(parallel, mesh),
        ),
        ExpertParallelGroups(
            mesh.interleaver,
            mesh.ep_group,
            mesh.etp_group,
            mesh.token_group,
            parallel.dispatcher,
        ),
        dtype=dtype,
        streams=Streams(seed, {"tp": mesh.tp_rank, "cp": mesh.cp_rank}),
        attention=partial(context_attention, parallel.cp_method, mesh),
    )
    with torch.device("meta"):
        return GPT(config, layers, stages)


def context_attention(
    method: str, mesh: ParallelMesh, window: int | None = None
) -> nn.Module:
    """Makes the attention over sequences that are split over context-parallel ranks.

    With a `window`, tokens attend to that many last tokens only.
    """
    device = mesh.device_kind
    if mesh.cp_group is None:
        return LocalAttention(device, window)
    if method == "p2p":
        return RingAttention(mesh.cp_group, device, window)
    if method == "all_gather":
        return AllGatherAttention(mesh.cp_group, device, window)
    if method == "a2a":
        return UlyssesAttention(mesh.cp_group, LocalAttention(device, window))
    # a2a+p2p: near ranks exchange heads, far ranks pass keys and values around a ring,
    # which overlaps transfers with computation.
    exchange, ring = mesh.cp_levels
    return UlyssesAttention(exchange, RingAttention(ring, device, window))


def _parameter_table(
    config: TrainConfig, mesh: ParallelMesh, stages: Sequence[StageContents]
) -> tuple[LocalParameter, ...]:
    return local_parameters(
        config.model,
        mesh.dims.of_group,
        mesh.dims.rank_in_group(mesh.rank),
        sequence_parallel=config.parallel.sequence_parallel,
        stages=stages,
    )


def _require_grads(module: GPT, table: Sequence[LocalParameter]) -> None:
    """Disables gradients of parameters that are frozen in the table."""
    for local in table:
        module.get_parameter(local.name).requires_grad_(local.trainable)


def allocate_expert_biases(module: GPT, device: torch.device) -> dict[str, ExpertBias]:
    """Allocates the model's balancing biases (zeros); returns them by logical name."""
    biases = {}
    for name, part in module.named_modules():
        if isinstance(part, ExpertBias):
            part.allocate(device)
            biases[name] = part
    return biases


def _aux_losses(module: GPT, config: ModelConfig) -> dict[str, list[AuxLoss]]:
    # Kinds and order are those of the whole model: ranks sum all kinds in one collective,
    # and a pipeline stage may lack a kind.
    losses: dict[str, list[AuxLoss]] = {kind: [] for kind in config.aux_losses}
    for part in module.modules():
        if isinstance(part, AuxLoss) and part.kind in losses:
            losses[part.kind].append(part)
    return losses
