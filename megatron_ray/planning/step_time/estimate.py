"""Estimates how long a step takes, before anything is started.

A rank's microbatch takes its matrix products + attention + memory-bound operations +
exposed communication. The step takes that of the slowest pipeline rank, times the
microbatches, plus the pipeline bubble (of the schedule's simulation), plus the optimizer
update. Communication that overlaps with computation counts only as far as it takes
longer than the computation.

Owns: putting a step together of its parts. Pure. Must not know: torch, the service.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan, plan_pipeline
from megatron_ray.pipeline_parallel.schedules.simulation import Costs
from megatron_ray.planning.buffers import RankBuffers, distinct_buffers
from megatron_ray.planning.flops import flops_per_token
from megatron_ray.planning.hardware import Efficiency, Hardware
from megatron_ray.planning.microbatch import num_microbatches
from megatron_ray.planning.network import Network
from megatron_ray.planning.pipeline import bubble
from megatron_ray.planning.step_time.microbatch import MicrobatchTime, microbatch_time
from megatron_ray.planning.step_time.update import UpdateTime, step_update


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
    """Optimizer with its exposed communication, and with the copies of optimizer.offload."""
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
        update = self.update.seconds(efficiency, microbatch)
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
        stages.append(microbatch_time(config, dims, pipeline, buffers, network, precision))
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
