"""How long a step takes, before anything is started: an estimate.

Owns: from work and bytes to seconds on a named device.

A rank's microbatch is products + attention + trips to memory + what it has to wait for
of what is sent. The slowest pipeline rank's, times the microbatches, plus the
schedule's bubble (the simulator's), plus the update. Sends that have something to hide
behind count only as far as they take longer than that. Pure. Must not know: torch, the
service.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan, plan_pipeline
from megatron_ray.pipeline_parallel.schedules.simulation import Costs
from megatron_ray.planning.buffers import RankBuffers, distinct_buffers, is_fully_sharded
from megatron_ray.planning.communication import (
    Axis,
    Kind,
    Tally,
    stage_communication,
    transfer_bytes,
    update_communication,
)
from megatron_ray.planning.flops import flops_per_token
from megatron_ray.planning.hardware import Efficiency, Hardware
from megatron_ray.planning.microbatch import num_microbatches, width_of
from megatron_ray.planning.pipeline import bubble
from megatron_ray.planning.work import Work, stage_work, update_work


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, on average over ranks that have equally much to do."""

    step_s: float
    products_s: float
    attention_s: float
    memory_s: float
    """Norms, activations, losses: bound by memory."""
    communication_s: float
    """What is waited for."""
    bubble_s: float
    update_s: float
    """Optimizer, with the gradients and weights that are waited for."""
    model_flops: float
    """Of the whole step over all ranks, as MFU counts them: nothing recomputed,
    attention in full, frozen weights like all others."""
    mfu: float
    """model_flops / (step_s x ranks x the device's peak)."""
    tokens_per_s: float
    """Over all ranks."""

    @property
    def bubble_share(self) -> float:
        """Of the step."""
        return self.bubble_s / self.step_s


@dataclass(frozen=True)
class Parts:
    """Seconds of one microbatch on one rank if every figure of the device were reached."""

    products: float
    attention: float
    memory: float
    exposed: float
    """Sends that are waited for."""
    ring: float
    """Keys and values that move while others are attended to."""
    hidden: float
    """Sends that move while the rest is computed: activations between stages, weights
    that ZeRO-3 gathers."""
    latency: float

    def seconds(self, share: Efficiency) -> tuple[float, float, float, float]:
        """(products, attention, memory, waiting) at these efficiencies."""
        products = self.products / share.products
        attention = self.attention / share.attention
        memory = self.memory / share.memory
        ring = max(0.0, self.ring / share.network - attention)
        hidden = max(0.0, self.hidden / share.network - products - attention - memory)
        return (
            products,
            attention,
            memory,
            self.exposed / share.network + ring + hidden + self.latency,
        )


@dataclass(frozen=True)
class StepParts:
    """Everything that a step's time is made of, before efficiencies."""

    stages: tuple[Parts, ...]
    """By kind of pipeline rank: one microbatch through all of its chunks."""
    num_microbatches: int
    bubble: float
    """In microbatches."""
    update: "Update"
    model_flops: float
    tokens: int
    ranks: int
    peak: float

    def step_time(self, share: Efficiency) -> StepTime:
        """At these efficiencies."""
        each = [parts.seconds(share) for parts in self.stages]
        slowest = max(each, key=sum)
        products, attention, memory, waiting = (
            seconds * self.num_microbatches for seconds in slowest
        )
        idle = self.bubble * sum(slowest)
        backward = sum(slowest) * 2 / 3
        once = self.update
        update = (
            once.memory / share.memory
            + max(0.0, once.reduced / share.network - backward)
            + once.published / share.network
        )
        step = products + attention + memory + waiting + idle + update
        mfu = self.model_flops / (step * self.ranks * self.peak)
        return StepTime(
            step,
            products,
            attention,
            memory,
            waiting,
            idle,
            update,
            self.model_flops,
            mfu,
            self.tokens / step,
        )


def step_time(
    config: TrainConfig, hardware: Hardware, precision: str | None = None
) -> StepTime | None:
    """Of a resolved config whose vocabulary is known; None where the device is not
    known to compute in the precision.
    """
    precision = precision or config.training.precision
    if precision not in hardware.efficiencies:
        return None
    return step_parts(config, hardware, precision).step_time(
        hardware.efficiencies[precision]
    )


@dataclass(frozen=True)
class Update:
    """What happens once a step on a rank, in seconds if every figure of the device were
    reached: the same for every micro batch.
    """

    memory: float
    reduced: float
    """Gradients that are reduced while the last microbatch goes back."""
    published: float
    """Weights and sums that nothing hides."""


def step_parts(config: TrainConfig, hardware: Hardware, precision: str) -> StepParts:
    """What a step's time is made of on a kind of device."""
    dims = ParallelDims.of(config.parallel)
    pipeline = plan_pipeline(config)
    kinds = distinct_buffers(config, dims, pipeline)
    return parts_with(
        config, hardware, precision, step_update(config, hardware, kinds), kinds
    )


def parts_with(
    config: TrainConfig,
    hardware: Hardware,
    precision: str,
    update: Update,
    kinds: Sequence[RankBuffers],
) -> StepParts:
    """The same where the update is known already, of these kinds of pipeline ranks."""
    dims = ParallelDims.of(config.parallel)
    pipeline = plan_pipeline(config)
    training = config.training
    count = num_microbatches(config)
    network = _Network(dims, hardware)
    costs = Costs(1.0, 2.0 if training.recompute.granularity == "full" else 1.0, 1.0)
    return StepParts(
        stages=tuple(
            _microbatch(config, dims, pipeline, held, network, precision) for held in kinds
        ),
        num_microbatches=count,
        bubble=bubble(pipeline, count, costs) / costs.microbatch,
        update=update,
        model_flops=float(flops_per_token(config.model, training.seq_length))
        * training.seq_length
        * training.global_batch_size,
        tokens=training.seq_length * training.global_batch_size,
        ranks=dims.world_size,
        peak=hardware.peaks[precision],
    )


def step_update(
    config: TrainConfig, hardware: Hardware, kinds: Sequence[RankBuffers]
) -> Update:
    """Of the pipeline rank for which each part takes longest."""
    dims = ParallelDims.of(config.parallel)
    pipeline = plan_pipeline(config)
    network = _Network(dims, hardware)
    found = [_update(config, dims, pipeline, held, network) for held in kinds]
    return Update(*(max(part) for part in zip(*found, strict=True)))


def _microbatch(
    config: TrainConfig,
    dims: ParallelDims,
    pipeline: PipelinePlan,
    held: RankBuffers,
    network: "_Network",
    precision: str,
) -> Parts:
    """Of one pipeline rank, all its chunks."""
    stages = pipeline.stages_of(held.pp_rank)
    hardware = network.hardware
    work = sum((stage_work(config, stage) for stage in stages), Work())
    sent = Tally({})
    for stage in stages:
        sent.add_all(stage_communication(config, dims, stage))
    hidden = (
        network.seconds("pp", "send", 2 * len(stages) * transfer_bytes(config))
        if dims.pp > 1
        else 0.0
    )
    if is_fully_sharded(config, dims):
        hidden += _gathering(config, dims, held, network)
    ring = [(axis, kind) for axis, kind in sent.bytes if (axis, kind) == ("cp", "send")]
    others = [way for way in sent.bytes if way not in ring]
    peak = hardware.peaks[precision]
    attention_peak = hardware.peaks.get("bf16" if precision == "fp8" else precision, 0.0)
    return Parts(
        products=work.products / peak,
        attention=work.attention / attention_peak,
        memory=work.memory / hardware.memory_bandwidth,
        exposed=network.total(sent, others),
        ring=network.total(sent, ring),
        hidden=hidden,
        latency=hardware.latency_s * sum(sent.operations[way] for way in others),
    )


def _gathering(
    config: TrainConfig, dims: ParallelDims, held: RankBuffers, network: "_Network"
) -> float:
    """ZeRO-3: weights are gathered for the forward, for the backward and for a second
    forward; gradients are scattered in fp32.
    """
    width = width_of(config)
    seconds = 0.0
    passes = 3 if config.training.recompute.granularity == "full" else 2
    axes: tuple[tuple[Axis, bool, int], ...] = (
        ("dp", False, dims.size("dp", "cp")),
        ("edp", True, dims.expert_dp),
    )
    for axis, of_expert, size in axes:
        elements = sum(
            parameter.num_elements
            for parameter in held.table
            if parameter.of_expert == of_expert
        )
        seconds += passes * network.seconds(axis, "all_gather", elements * width / size)
        seconds += network.seconds(axis, "reduce_scatter", 4 * elements)
    return seconds


def _update(
    config: TrainConfig,
    dims: ParallelDims,
    pipeline: PipelinePlan,
    held: RankBuffers,
    network: "_Network",
) -> tuple[float, float, float]:
    """(trips to memory, reductions, everything that nothing hides) at the end of a
    step, in seconds.
    """
    work = update_work(
        sum(buffer.num_updated for buffer in held.buffers),
        sum(buffer.plan.num_trainable for buffer in held.buffers),
    )
    if is_fully_sharded(config, dims):
        return work.memory / network.hardware.memory_bandwidth, 0.0, 0.0
    sent = update_communication(config, dims, pipeline, held)
    reductions = [
        way for way in sent.bytes if way[0] in ("dp", "edp") and way[1] != "all_gather"
    ]
    others = [way for way in sent.bytes if way not in reductions]
    return (
        work.memory / network.hardware.memory_bandwidth,
        network.total(sent, reductions),
        network.total(sent, others),
    )


class _Network:
    """Seconds of collectives at full bandwidth."""

    def __init__(self, dims: ParallelDims, hardware: Hardware) -> None:
        self.hardware = hardware
        groups: dict[Axis, tuple[int, ...]] = {
            "tp": dims.group_of(0, ("tp",)),
            "cp": dims.group_of(0, ("cp",)),
            "pp": dims.group_of(0, ("pp",)),
            "dp": dims.group_of(0, ("dp", "cp")),
            "ep": dims.experts.group_of(0, ("ep",)),
            "etp": dims.experts.group_of(0, ("etp",)),
            "edp": dims.experts.group_of(0, ("edp",)),
            "embedding": dims.embedding_group_of(0),
            "tokens": dims.group_of(0, ("tp", "cp")),
            "world": (0, dims.world_size - 1),
        }
        self._sizes = {axis: len(members) for axis, members in groups.items()}
        self._bandwidths = {
            axis: self._bandwidth(members) for axis, members in groups.items()
        }

    def _bandwidth(self, members: tuple[int, ...]) -> float:
        within = sum(member < self.hardware.node_size for member in members)
        return (
            self.hardware.link_bandwidth
            if within == len(members)
            else self.hardware.link(within)
        )

    def seconds(self, axis: Axis, kind: Kind, size: float) -> float:
        """Of `size` bytes handed over, by rings: each of n ranks passes on n - 1 parts
        (two rounds of them in an all-reduce).
        """
        n = self._sizes[axis]
        passed = {
            "all_reduce": 2 * (n - 1) / n,
            "reduce_scatter": (n - 1) / n,
            "all_to_all": (n - 1) / n,
            "all_gather": n - 1,
            "send": 1,
        }
        return passed[kind] * size / self._bandwidths[axis]

    def total(self, sent: Tally, ways: Iterable[tuple[Axis, Kind]]) -> float:
        """Of these parts of a tally."""
        return sum(self.seconds(axis, kind, sent.bytes[axis, kind]) for axis, kind in ways)
