"""Decides at which data-parallel size an elastic job runs.

Owns: the legal sizes, when a job shrinks after a loss, when it grows back. Pure: times
and counts come in as values. Must not know: Ray, torch, clocks, how ranks are started.

Only dp changes. Tensor, pipeline, context and expert degrees stay, and so do the global
batch and the order of the data: with fewer replicas each does more microbatches.
"""

from dataclasses import dataclass

from megatron_ray.config.problem import Problem
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.validation import check
from workers.protocol.job import JobSpec
from workers.protocol.wire import DesiredJob

REPLACE_S = 20.0
"""Seconds that Ray gets to move lost bundles to nodes with room, before a job shrinks."""
STEADY_S = 30.0
"""Seconds for which the lost resources must be back before a job grows."""
SUSPECT_S = 90.0
"""Seconds for which a node that fell silent is not used again. Ray itself needs a minute
to notice a frozen node, and until then lists its bundles as ready."""
GAIN = 3.0
"""Growing must save this many times the seconds that it costs."""


def with_dp(spec: JobSpec, dp: int) -> JobSpec:
    """Returns the spec at another data-parallel size."""
    parallel = spec.parallel.model_copy(update={"dp": dp})
    return spec.model_copy(update={"parallel": parallel})


def resized_dp(spec: JobSpec, desired: DesiredJob) -> int | None:
    """Returns the size that the service desires for a job, None if it is the spec's."""
    dp = (desired.spec.get("parallel") or {}).get("dp")
    # `auto`, and absent in a spec that is not resolved.
    if not isinstance(dp, int) or dp == spec.parallel.dp:
        return None
    return dp


def dp_problems(spec: JobSpec, dp: int) -> list[Problem]:
    """Returns why a job cannot run at a data-parallel size; nothing if it can."""
    elastic = spec.elastic
    if elastic is not None and not elastic.min_dp <= dp <= elastic.max_dp:
        detail = (
            f"dp={dp} is outside elastic.min_dp={elastic.min_dp} to elastic.max_dp="
            f"{elastic.max_dp}"
        )
        return [Problem("/parallel/dp", "elastic_bounds", detail)]
    return check.find_problems(with_dp(spec, dp))


def legal_dps(spec: JobSpec) -> tuple[int, ...]:
    """Returns the sizes at which an elastic job can run, smallest first."""
    elastic = spec.elastic
    if elastic is None:
        return ()
    # Every replica does the same number of microbatches, so only divisors are checked.
    microbatches = spec.training.global_batch_size // spec.training.micro_batch_size
    sizes = []
    for dp in range(elastic.min_dp, min(elastic.max_dp, microbatches) + 1):
        if microbatches % dp == 0 and not check.find_problems(with_dp(spec, dp)):
            sizes.append(dp)
    return tuple(sizes)


def elastic_problems(spec: JobSpec) -> list[Problem]:
    """Returns what is wrong with `elastic`, given the rest of the spec."""
    elastic = spec.elastic
    if elastic is None:
        return []
    dp = spec.parallel.dp
    if dp != "auto" and not elastic.min_dp <= dp <= elastic.max_dp:
        detail = (
            f"dp={dp} is outside elastic.min_dp={elastic.min_dp} to elastic.max_dp="
            f"{elastic.max_dp}; set a dp between them, or auto"
        )
        return [Problem("/parallel/dp", "elastic_bounds", detail)]
    if legal_dps(spec):
        return []
    training = spec.training
    detail = (
        f"no dp from {elastic.min_dp} to {elastic.max_dp} is possible: micro_batch_size x dp "
        f"must divide global_batch_size={training.global_batch_size} "
        f"(micro_batch_size={training.micro_batch_size}), and the layout must allow it"
    )
    return [Problem("/elastic", "elastic_sizes", detail)]


# ---- shrinking after a loss


@dataclass(frozen=True)
class Shortage:
    """The resources of a job that waits for lost ones."""

    islands: int
    """Islands of the job at its full size."""
    available: int
    """Islands whose resources it still holds."""
    capacity: int
    """Islands that the living nodes could hold if no other job ran."""
    waited_s: float
    """Seconds since the job began to wait."""


def shrunk_dp(spec: JobSpec, shortage: Shortage) -> int | None:
    """Returns the size at which a job goes on without the lost resources.

    None: it waits for them, or cannot run with what is left.
    """
    # With room elsewhere, Ray replaces a lost bundle within seconds.
    if shortage.capacity >= shortage.islands and shortage.waited_s < REPLACE_S:
        return None
    most = shortage.available // islands_per_replica(spec)
    smaller = [dp for dp in legal_dps(spec) if dp <= most and dp != spec.parallel.dp]
    return max(smaller, default=None)


def islands_per_replica(spec: JobSpec) -> int:
    """Returns the number of tensor-parallel groups of one replica."""
    return spec.parallel.pp * spec.parallel.cp


def islands_of(spec: JobSpec) -> int:
    """Returns the number of tensor-parallel groups of a resolved spec."""
    dims = ParallelDims.of(spec.parallel)
    return dims.world_size // dims.tp


# ---- growing back


@dataclass(frozen=True)
class GrowthFacts:
    """What is known when a shrunk job could grow."""

    dp: int
    """Size at which it runs."""
    full_dp: int
    """Size at which it would run."""
    steady_s: float
    """Seconds for which the missing resources have been there."""
    step_s: float
    """Seconds of a step at its present size."""
    remaining_steps: int
    restart_s: float
    """Seconds that the last start of the ranks took, up to the first step."""


@dataclass(frozen=True)
class GrowthDecision:
    """Whether a job grows now, and why."""

    grow: bool
    message: str


def decide_growth(facts: GrowthFacts) -> GrowthDecision:
    """Returns whether growing is worth a restart.

    The time of a step is taken to shrink in proportion to dp, which is an upper bound of
    the gain, and therefore the gain must exceed the cost several times.
    """
    if facts.steady_s < STEADY_S:
        return GrowthDecision(False, f"resources are back for {facts.steady_s:.0f} s only")
    left_s = facts.remaining_steps * facts.step_s
    gain_s = left_s * (1 - facts.dp / facts.full_dp)
    message = (
        f"from dp={facts.dp} to dp={facts.full_dp}: saves up to {gain_s:.0f} s of "
        f"{left_s:.0f} s, costs {facts.restart_s:.0f} s"
    )
    return GrowthDecision(gain_s > GAIN * facts.restart_s, message)
