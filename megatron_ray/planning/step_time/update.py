"""Estimates how long the optimizer's update takes, once a step.

Owns: what of its communication overlaps with a microbatch. Pure. Must not know: torch,
how long a microbatch takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan, plan_pipeline
from megatron_ray.planning.buffers import RankBuffers, is_fully_sharded, planned_matrices
from megatron_ray.planning.communication import (
    gather_scale_communication,
    matrix_communication,
    mean_sync_bytes,
    update_communication,
)
from megatron_ray.planning.hardware import Efficiency, Hardware
from megatron_ray.planning.memory import update_state_bytes
from megatron_ray.planning.network import Network
from megatron_ray.planning.tally import Axis, Kind
from megatron_ray.planning.work import orthogonalization_work, update_work

_FP32_SHARE = 1 / 16
"""Peak of a GPU in fp32 by that in bf16; A100 and H100 data sheets."""
_HOST_SHARE = 0.8
"""Share of a PCIe link that copies from pinned memory reach: assumed, not fitted."""


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
    copied: float = 0.0
    """State that optimizer.offload brings to the device and back: the update waits for it."""

    def seconds(self, efficiency: Efficiency, microbatch: float) -> float:
        """Returns the seconds at these efficiencies, beside microbatches of that length."""
        # The backward pass takes twice as long as the forward pass.
        forward = microbatch / 3
        reduced = self.reduced / efficiency.network
        gathered = self.gathered / efficiency.network
        return (
            self.memory / efficiency.memory
            + self.products / efficiency.products
            + max(0.0, reduced - 2 * forward)
            + max(0.0, gathered - forward)
            + self.published / efficiency.network
            + self.copied / _HOST_SHARE
        )


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
    copied = 0.0
    for buffers in ranks:
        update = _update(config, dims, pipeline, buffers, network)
        # The ranks wait for each other in each of these parts.
        memory = max(memory, update.memory)
        products = max(products, update.products)
        reduced = max(reduced, update.reduced)
        published = max(published, update.published)
        gathered = max(gathered, update.gathered)
        if config.optimizer.offload:
            # There and back.
            copied = max(copied, 2 * update_state_bytes(config, dims, buffers))
    return UpdateTime(
        memory, products, reduced, published, gathered, copied / hardware.host_bandwidth
    )


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
