"""Estimates how long a microbatch takes on one rank.

Owns: which communication overlaps with which computation. Pure. Must not know: torch,
how many microbatches a step has.
"""

from dataclasses import dataclass
from typing import NamedTuple

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan
from megatron_ray.planning.buffers import RankBuffers, is_fully_sharded
from megatron_ray.planning.communication import gather_communication, transfer_bytes
from megatron_ray.planning.hardware import Efficiency, Hardware
from megatron_ray.planning.layer_communication import stage_communication
from megatron_ray.planning.microbatch import grad_width_of
from megatron_ray.planning.network import Network
from megatron_ray.planning.tally import Axis, Kind, Tally
from megatron_ray.planning.work import Work, stage_work


class MicrobatchSeconds(NamedTuple):
    """Seconds of one microbatch on one rank, with exposed communication only."""

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
    weights that ZeRO-3 gathers, tokens of experts while another pass computes."""
    latency: float
    multiplied: float
    """Tokens that tp ranks send while they multiply others."""

    def seconds(self, efficiency: Efficiency) -> MicrobatchSeconds:
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
        return MicrobatchSeconds(products, attention, memory, communication)


def microbatch_time(
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
    hidden: list[tuple[Axis, Kind]] = []
    ring: list[tuple[Axis, Kind]] = []
    multiplied: list[tuple[Axis, Kind]] = []
    others: list[tuple[Axis, Kind]] = []
    operations = 0
    for key in communication.bytes:
        # These overlap with computation, and so does their latency.
        if key == ("cp", "send"):
            ring.append(key)
        elif key == ("ep", "all_to_all") and pipeline.in_pairs:
            hidden.append(key)
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
        overlapped=overlapped + network.total(communication, hidden),
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
