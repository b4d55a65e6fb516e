"""Estimates the memory of each rank, before anything is started.

Weights, gradients and optimizer state are those of the flat buffers that will be
allocated, alignment and bucket padding included. Activations are an estimate from
tensor shapes (`activations`).

Owns: adding these up, and finding the rank with most. Pure. Must not know: torch,
nodes, how much memory a device has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed.device_kind import DeviceKind
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
    gathered_width,
    is_fully_sharded,
)
from megatron_ray.planning.microbatch import (
    all_num_microbatches,
    grad_width_of,
    width_of,
)
from megatron_ray.planning.pipeline import kept_and_released
from megatron_ray.sharding.parameter_types import LocalParameter

_FP32 = 4
_REMAINDER = 2
NUM_PEER_COPIES = 4
"""Copies of one rank's size in its process's memory."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, by what they are for."""

    rank: int
    parameters_bytes: int
    """Weights; under ZeRO-3 this rank's rows in fp32."""
    gradients_bytes: int
    """Main gradients of parameters that are trained and, where these are shorter, fp32
    copies of those that this rank updates with."""
    optimizer_bytes: int
    """Moments, with bf16 or fp16 the fp32 main parameters or their remainders, the copy of
    main parameters that callbacks.optimizer makes, and those of an outer optimizer; this
    rank's share where they are sharded over dp. Without what optimizer.offload keeps in
    host memory."""
    offloaded_bytes: int
    """Moments and main parameters, or their remainders, in host memory."""
    gathered_bytes_estimate: int
    """Weights and gradients that ZeRO-3 gathers: those of two layers, and of everything
    outside of layers."""
    activations_bytes_estimate: int
    """Peak of the activations of all microbatches in flight, recomputed ones included;
    kernels and the allocator may need more or less."""

    @property
    def total_bytes(self) -> int:
        """Sum of all terms on the device."""
        state = self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes
        return state + self.gathered_bytes_estimate + self.activations_bytes_estimate

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by name of what they are for, largest first."""
        terms = {
            "weights": self.parameters_bytes,
            "gradients": self.gradients_bytes,
            "optimizer state": self.optimizer_bytes,
            "gathered weights": self.gathered_bytes_estimate,
            "activations": self.activations_bytes_estimate,
        }
        return dict(sorted(terms.items(), key=lambda term: -term[1]))


def fullest_rank(config: TrainConfig, device: DeviceKind) -> RankMemory:
    """Returns the memory of the rank with most bytes, or of the first such rank.

    Raises ValueError while dp or the vocabulary are not known.
    """
    world = ParallelDims.of(config.parallel)
    dims = world.of_group
    pipeline = plan_pipeline(config)
    # Ranks of one pipeline stage have equally many bytes, but for rows that ZeRO-3 cannot
    # split evenly, of which the first replica has most.
    ranks = []
    for buffers in distinct_buffers(config, dims, pipeline):
        state = state_memory(config, dims, buffers)
        ranks.append(with_activations(config, pipeline, state, buffers.pp_rank, device))
    fullest = max(ranks, key=lambda memory: memory.total_bytes)
    return replace(fullest, rank=world.rank_of(0, fullest.rank))


def peer_copies_bytes(config: TrainConfig) -> int:
    """Returns the host memory for `checkpoint.peer_every_steps` on the fullest rank.

    Two copies of its own state, and two of the rank whose partner it is. Raises
    ValueError while dp or the vocabulary are not known.
    """
    dims = ParallelDims.of(config.parallel).of_group
    largest = 0
    for buffers in distinct_buffers(config, dims, plan_pipeline(config)):
        num_bytes = 0
        for buffer in buffers.buffers:
            # Main parameters, in fp32 whatever the precision, and the optimizers' state.
            num_bytes += buffer.num_updated * _FP32 + buffer.state_bytes(config.optimizer)
            num_bytes += buffer.outer_bytes(config.parallel)
        largest = max(largest, num_bytes)
    return NUM_PEER_COPIES * largest


def with_activations(
    config: TrainConfig,
    pipeline: PipelinePlan,
    state: RankMemory,
    pp_rank: int,
    device: DeviceKind,
) -> RankMemory:
    """Returns a rank's memory with activations added.

    Only they depend on the micro batch size, on recomputation and on the kernels of the
    device.
    """
    activations = _activations(config, pipeline, pp_rank, device)
    return replace(state, activations_bytes_estimate=activations)


def update_state_bytes(
    config: TrainConfig, dims: ParallelDims, buffers: RankBuffers
) -> int:
    """Returns the bytes of optimizer state and main parameters of a rank.

    They are in host memory with optimizer.offload.
    """
    main_width = 0
    # With short weights there are fp32 main parameters too; under ZeRO-3 the
    # weights themselves are fp32.
    if width_of(config) < _FP32 and not is_fully_sharded(config, dims):
        main_width = _FP32
        if config.optimizer.store_param_remainders:
            main_width = _REMAINDER
    state = 0
    for buffer in buffers.buffers:
        state += buffer.state_bytes(config.optimizer)
        state += buffer.outer_bytes(config.parallel)
        state += buffer.num_updated * main_width
    return state


def state_memory(
    config: TrainConfig, dims: ParallelDims, buffers: RankBuffers
) -> RankMemory:
    """Returns a rank's memory without activations."""
    is_sharded = is_fully_sharded(config, dims)
    parameters = 0
    trained = 0
    updated = 0
    for buffer in buffers.buffers:
        parameters += buffer.plan.num_elements * buffer.width
        trained += buffer.plan.num_trainable
        updated += buffer.num_updated
    state = update_state_bytes(config, dims, buffers)
    offloaded = 0
    if config.optimizer.offload:
        offloaded = state
        state = 0
    monitor = config.callbacks.optimizer
    if monitor is not None and monitor.compares_weights:
        state += updated * _FP32
    gathered = 0
    if is_sharded:
        gathered = _gathered(config, buffers.table)
    return RankMemory(
        rank=buffers.rank,
        parameters_bytes=parameters,
        gradients_bytes=_gradients(config, trained, updated, is_sharded=is_sharded),
        optimizer_bytes=state,
        offloaded_bytes=offloaded,
        gathered_bytes_estimate=gathered,
        activations_bytes_estimate=0,
    )


def _gradients(config: TrainConfig, trained: int, updated: int, *, is_sharded: bool) -> int:
    """Returns the bytes of the gradients of so many elements."""
    width = grad_width_of(config)
    # ZeRO-3 keeps the sums in fp32.
    if is_sharded or width == _FP32:
        return trained * _FP32
    return trained * width + updated * _FP32


def _gathered(config: TrainConfig, table: Sequence[LocalParameter]) -> int:
    """Returns the bytes of whole weights and gradients under ZeRO-3.

    Those are the weights of the current layer and of the next one, which is gathered
    ahead, the gradients of one layer, and weights and gradients outside of layers, which
    stay gathered.
    """
    layers: dict[str, int] = {}
    outside = 0
    for parameter in table:
        width = gathered_width(config, parameter)
        kind, index, *_ = parameter.name.split(".")
        if kind in ("layers", "mtp"):
            size = prod(parameter.shape) * (2 * width + _FP32)
            layers[kind + index] = layers.get(kind + index, 0) + size
        else:
            outside += prod(parameter.shape) * (width + _FP32)
    return outside + max(layers.values(), default=0)


def _activations(
    config: TrainConfig, pipeline: PipelinePlan, pp_rank: int, device: DeviceKind
) -> int:
    """Returns the most bytes of activations that a rank has at once."""
    kept_by_chunk = []
    recomputed = 0
    loss = 0
    for stage in pipeline.stages_of(pp_rank):
        kept_by_chunk.append(kept_by_stage(config, stage, device))
        recomputed = max(recomputed, recomputed_by_stage(config, stage, device))
        if stage.loss:
            loss = working_head(config, device)
    peak = kept_by_chunk[0]
    # Without a schedule each microbatch's backward runs before the next forward.
    if pipeline.stages.num_stages > 1 or pipeline.in_pairs:
        peak = 0
        # Interleaving enlarges its groups by a remainder, which a small batch may have.
        for count in all_num_microbatches(config):
            events = kept_and_released(pipeline, count, pp_rank)
            peak = max(peak, _peak(events, kept_by_chunk))
    return peak + recomputed + loss


def _peak(events: Sequence[int], kept_by_chunk: Sequence[int]) -> int:
    """Returns the most bytes at once, from the events of `kept_and_released`."""
    current = 0
    most = 0
    for event in events:
        if event > 0:
            current += kept_by_chunk[event - 1]
        else:
            current -= kept_by_chunk[-event - 1]
        most = max(most, current)
    return most
