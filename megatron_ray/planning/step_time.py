"""Estimates how long a step takes, before anything is started.

A rank's microbatch takes its matrix products + attention + memory-bound operations +
exposed communication. The step takes that of the slowest pipeline rank, times the
microbatches, plus the pipeline bubble (of the schedule's simulation), plus the optimizer
update. Communication that overlaps with computation counts only as far as it takes
longer than the computation.

Owns: turning work and bytes into seconds on a given device. Pure. Must not know: torch,
the service.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan, plan_pipeline
from megatron_ray.pipeline_parallel.schedules.simulation import Costs
from megatron_ray.planning.buffers import (
    RankBuffers,
    distinct_buffers,
    is_fully_sharded,
    planned_matrices,
)
from megatron_ray.planning.communication import (
    gather_communication,
    gather_scale_communication,
    matrix_communication,
    mean_sync_bytes,
    transfer_bytes,
    update_communication,
)
from megatron_ray.planning.flops import flops_per_token
from megatron_ray.planning.hardware import Efficiency, Hardware
from megatron_ray.planning.layer_communication import stage_communication
from megatron_ray.planning.microbatch import grad_width_of, num_microbatches
from megatron_ray.planning.network import Network
from megatron_ray.planning.pipeline import bubble
from megatron_ray.planning.tally import Axis, Kind, Tally
from megatron_ray.planning.work import (
    Work,
    orthogonalization_work,
    stage_work,
    update_work,
)

_FP32_SHARE = 1 / 16
"""Peak of a GPU in fp32 by that in bf16; A100 and H100 data sheets."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the slowest kind of rank, by what they are spent on."""

    step_s: float
    products_s: float
    """Matrix products."""
    attention_s: float
    memory_s: float
    """Norms, activations, losses: bound by memory bandwidth."""
    communication_s: float
    """Exposed communication of microbatches."""
    bubble_s: float
    """Idle time of the pipeline."""
    update_s: float
    """Optimizer, with exposed communication of gradients and weights."""
    model_flops: float
    """FLOPs of the whole step over all ranks, as MFU counts them: nothing recomputed,
    attention in full, frozen weights like all others."""
    mfu: float
    """model_flops / (step_s x ranks x the device's peak)."""
    tokens_per_s: float
    """Tokens per second over all ranks."""

    @property
    def bubble_share(self) -> float:
        """Share of the step in which the pipeline is idle."""
        return self.bubble_s / self.step_s


class _MicrobatchSeconds(NamedTuple):
    products: float
    attention: float
    memory: float
    communication: float


@dataclass(frozen=True)
class MicrobatchTime:
    """Seconds of one microbatch on one rank at a device's published figures."""

    products: float
    attention: float
    memory: float
    exposed: float
    """Communication that computation waits for."""
    ring: float
    """Keys and values that are sent while attention is computed on others."""
    overlapped: float
    """Communication that overlaps with all computation: activations between stages,
    weights that ZeRO-3 gathers."""
    latency: float
    multiplied: float
    """Tokens that tp ranks send while they multiply others."""

    def seconds(self, efficiency: Efficiency) -> _MicrobatchSeconds:
        """Returns the seconds at these efficiencies, with exposed communication only."""
        products = self.products / efficiency.products
        attention = self.attention / efficiency.attention
        memory = self.memory / efficiency.memory
        # The ring overlaps with the attention of its own tokens only.
        ring = max(0.0, self.ring / efficiency.network - attention)
        overlapped = self.overlapped / efficiency.network
        overlapped = max(0.0, overlapped - products - attention - memory)
        # The other half of products are gradients of weights and of column-parallel inputs.
        multiplied = max(0.0, self.multiplied / efficiency.network - products / 2)
        exposed = self.exposed / efficiency.network + multiplied
        communication = exposed + ring + overlapped + self.latency
        return _MicrobatchSeconds(products, attention, memory, communication)


@dataclass(frozen=True)
class UpdateTime:
    """Seconds that a rank needs once a step at a device's published figures.

    They do not depend on the micro batch size.
    """

    memory: float
    """The optimizer's reads and writes."""
    products: float
    """Products of an optimizer of matrices."""
    reduced: float
    """Gradients that are reduced during the backward pass of the last microbatch."""
    published: float
    """Weights and sums, whose communication nothing overlaps."""
    gathered: float = 0.0
    """Weights that are gathered during the forward pass of the first microbatch."""


@dataclass(frozen=True)
class StepParts:
    """The parts of a step's time, at a device's published figures."""

    stages: tuple[MicrobatchTime, ...]
    """One microbatch through all chunks of a rank, by kind of pipeline rank."""
    num_microbatches: int
    bubble: float
    """Pipeline bubble, in units of a microbatch."""
    update: UpdateTime
    model_flops: float
    tokens: int
    """Tokens of a step over all ranks."""
    ranks: int
    peak: float
    """Peak FLOP/s of a device."""

    def step_time(self, efficiency: Efficiency) -> StepTime:
        """Returns the time of a step at these efficiencies."""
        slowest = max((stage.seconds(efficiency) for stage in self.stages), key=sum)
        microbatch = sum(slowest)
        products = slowest.products * self.num_microbatches
        attention = slowest.attention * self.num_microbatches
        memory = slowest.memory * self.num_microbatches
        communication = slowest.communication * self.num_microbatches
        idle = self.bubble * microbatch
        update = self._update_seconds(efficiency, microbatch)
        step = products + attention + memory + communication + idle + update
        return StepTime(
            step_s=step,
            products_s=products,
            attention_s=attention,
            memory_s=memory,
            communication_s=communication,
            bubble_s=idle,
            update_s=update,
            model_flops=self.model_flops,
            mfu=self.model_flops / (step * self.ranks * self.peak),
            tokens_per_s=self.tokens / step,
        )

    def _update_seconds(self, efficiency: Efficiency, microbatch: float) -> float:
        # The backward pass takes twice as long as the forward pass.
        forward = microbatch / 3
        reduced = self.update.reduced / efficiency.network
        gathered = self.update.gathered / efficiency.network
        return (
            self.update.memory / efficiency.memory
            + self.update.products / efficiency.products
            + max(0.0, reduced - 2 * forward)
            + max(0.0, gathered - forward)
            + self.update.published / efficiency.network
        )


def step_time(
    config: TrainConfig, hardware: Hardware, precision: str | None = None
) -> StepTime | None:
    """Returns the estimated time of a step of a resolved config.

    The vocabulary must be known. `precision` is that of matrix products; by default the
    config's. None when the device has no figures for it.
    """
    precision = precision or precision_on(config, hardware)
    if precision not in hardware.efficiencies:
        return None
    efficiency = hardware.efficiencies[precision]
    return step_parts(config, hardware, precision).step_time(efficiency)


def precision_on(config: TrainConfig, hardware: Hardware) -> str:
    """Returns the precision that a device computes a config's matrix products in.

    All of them count as FP8 where layers multiply in FP8, as in the published runs that
    efficiencies are fitted to. Emulated products take CPUs as long as fp32 and GPUs as
    long as bf16, and the conversions are not counted.
    """
    fp8 = config.training.fp8
    if fp8 is None:
        return config.training.precision
    if hardware.device.multiplies_fp8(fp8.recipe) and "fp8" in hardware.efficiencies:
        return "fp8"
    if hardware.device.type == "cpu":
        return "fp32"
    return config.training.precision


def step_parts(
    config: TrainConfig,
    hardware: Hardware,
    precision: str,
    *,
    ranks: Sequence[RankBuffers] | None = None,
    update: UpdateTime | None = None,
) -> StepParts:
    """Returns what the time of a step on a kind of device consists of.

    `ranks` are the distinct kinds of pipeline ranks and `update` their UpdateTime.
    Callers that try many micro batch sizes pass them, because they do not depend on it.
    """
    world = ParallelDims.of(config.parallel)
    dims = world.of_group
    pipeline = plan_pipeline(config)
    training = config.training
    if ranks is None:
        ranks = distinct_buffers(config, dims, pipeline)
    if update is None:
        update = step_update(config, hardware, ranks)
    network = Network(world, hardware)
    stages = []
    for buffers in ranks:
        stages.append(_microbatch(config, dims, pipeline, buffers, network, precision))
    tokens = training.seq_length * training.global_batch_size
    flops = float(flops_per_token(config.model, training.seq_length))
    return StepParts(
        stages=tuple(stages),
        num_microbatches=num_microbatches(config),
        bubble=_bubble_in_microbatches(config, pipeline),
        update=update,
        model_flops=flops * training.seq_length * training.global_batch_size,
        tokens=tokens,
        ranks=world.world_size,
        peak=hardware.peaks[precision],
    )


def _bubble_in_microbatches(config: TrainConfig, pipeline: PipelinePlan) -> float:
    # In units of a forward pass. Full recomputation runs the forward pass again before
    # the backward pass.
    costs = Costs(1.0, 1.0, 1.0)
    if config.training.recompute.granularity == "full":
        costs = Costs(1.0, 2.0, 1.0)
    return bubble(pipeline, num_microbatches(config), costs) / costs.microbatch


def step_update(
    config: TrainConfig, hardware: Hardware, ranks: Sequence[RankBuffers]
) -> UpdateTime:
    """Returns the update's time, each part of the rank for which it takes longest."""
    world = ParallelDims.of(config.parallel)
    dims = world.of_group
    pipeline = plan_pipeline(config)
    network = Network(world, hardware)
    memory = 0.0
    products = 0.0
    reduced = 0.0
    published = 0.0
    gathered = 0.0
    for buffers in ranks:
        update = _update(config, dims, pipeline, buffers, network)
        # The ranks wait for each other in each of these parts.
        memory = max(memory, update.memory)
        products = max(products, update.products)
        reduced = max(reduced, update.reduced)
        published = max(published, update.published)
        gathered = max(gathered, update.gathered)
    return UpdateTime(memory, products, reduced, published, gathered)


def _microbatch(
    config: TrainConfig,
    dims: ParallelDims,
    pipeline: PipelinePlan,
    buffers: RankBuffers,
    network: Network,
    precision: str,
) -> MicrobatchTime:
    """Returns the time of a microbatch through all chunks of one pipeline rank."""
    hardware = network.hardware
    stages = pipeline.stages_of(buffers.pp_rank)
    work = Work()
    communication = Tally({})
    for stage in stages:
        work += stage_work(config, stage)
        communication.add_all(stage_communication(config, dims, stage))
    overlapped = 0.0
    if dims.pp > 1:
        # Activations and gradients, in and out of each chunk.
        overlapped += network.seconds(
            "pp", "send", 2 * len(stages) * transfer_bytes(config)
        )
    if is_fully_sharded(config, dims):
        overlapped += _zero3_seconds(config, dims, buffers, network)
    ring: list[tuple[Axis, Kind]] = []
    multiplied: list[tuple[Axis, Kind]] = []
    others: list[tuple[Axis, Kind]] = []
    operations = 0
    for key in communication.bytes:
        # Hops in a ring overlap with attention or products, and so does their latency.
        if key == ("cp", "send"):
            ring.append(key)
        elif key == ("tp", "send"):
            multiplied.append(key)
        else:
            others.append(key)
            operations += communication.operations[key]
    return MicrobatchTime(
        products=work.products / hardware.peaks[precision],
        attention=work.attention / _attention_peak(hardware, precision),
        memory=work.memory / hardware.memory_bandwidth,
        exposed=network.total(communication, others),
        ring=network.total(communication, ring),
        overlapped=overlapped,
        latency=hardware.latency_s * operations,
        multiplied=network.total(communication, multiplied),
    )


def _attention_peak(hardware: Hardware, precision: str) -> float:
    # Attention stays in bf16 where matrix products are in fp8.
    if precision == "fp8":
        return hardware.peaks.get("bf16", 0.0)
    return hardware.peaks[precision]


def _zero3_seconds(
    config: TrainConfig, dims: ParallelDims, buffers: RankBuffers, network: Network
) -> float:
    """Returns the seconds in which ZeRO-3 gathers weights and scatters gradients.

    Weights are gathered for the forward pass, for the backward pass and for a second
    forward pass.
    """
    passes = 2
    if config.training.recompute.granularity in ("operations", "full"):
        passes = 3
    dense = 0
    experts = 0
    for parameter in buffers.table:
        if parameter.of_expert:
            experts += parameter.num_elements
        else:
            dense += parameter.num_elements
    width = grad_width_of(config)
    gathers = gather_communication(config, dims, buffers)
    seconds = passes * network.total(gathers, gathers.bytes)
    seconds += network.seconds("dp", "reduce_scatter", width * dense)
    return seconds + network.seconds("edp", "reduce_scatter", width * experts)


def _update(
    config: TrainConfig,
    dims: ParallelDims,
    pipeline: PipelinePlan,
    buffers: RankBuffers,
    network: Network,
) -> UpdateTime:
    """Returns the time of the update on one pipeline rank."""
    updated = 0
    trained = 0
    state = 0
    for buffer in buffers.buffers:
        updated += buffer.num_updated
        trained += buffer.plan.num_trainable
        state += buffer.state_bytes(config.optimizer)
    work = update_work(updated, trained, state)
    memory = work.memory / network.hardware.memory_bandwidth
    matrices = _matrix_update(config, dims, buffers, network)
    if is_fully_sharded(config, dims):
        # Gradients arrive scattered, and weights are gathered by the next forward pass.
        communication = gather_scale_communication(config, dims, buffers)
        scales = network.total(communication, communication.bytes)
        return replace(matrices, memory=memory, published=matrices.published + scales)
    communication = update_communication(config, dims, pipeline, buffers)
    reductions: list[tuple[Axis, Kind]] = []
    gathers: list[tuple[Axis, Kind]] = []
    others: list[tuple[Axis, Kind]] = []
    for axis, kind in communication.bytes:
        # Buckets are reduced as soon as the backward pass has filled them.
        if axis in ("dp", "edp") and kind != "all_gather":
            reductions.append((axis, kind))
        elif axis in ("dp", "edp") and config.parallel.overlap_param_gather:
            gathers.append((axis, kind))
        else:
            others.append((axis, kind))
    averages = network.seconds("sync", "all_reduce", mean_sync_bytes(config, buffers))
    return UpdateTime(
        memory,
        matrices.products,
        network.total(communication, reductions),
        network.total(communication, others) + matrices.published + averages,
        network.total(communication, gathers),
    )


def _matrix_update(
    config: TrainConfig, dims: ParallelDims, buffers: RankBuffers, network: Network
) -> UpdateTime:
    """Returns the time in which matrices are put together and orthogonalized."""
    muon = config.optimizer.muon
    if muon is None:
        return UpdateTime(0.0, 0.0, 0.0, 0.0)
    matrices = planned_matrices(config, dims, buffers)
    peaks = network.hardware.peaks
    peak = peaks.get(muon.precision)
    if peak is None:
        # The tables have no fp32 of GPUs.
        peak = peaks["bf16"] * _FP32_SHARE
    flops = 0.0
    for entry in matrices:
        flops += orthogonalization_work(entry, muon.steps).products
    moved = matrix_communication(dims, matrices)
    return UpdateTime(0.0, flops / peak, 0.0, network.total(moved, moved.bytes))
