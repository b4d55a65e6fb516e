"""Decides at which data-parallel size an elastic job runs.

Owns: the legal sizes, when a job shrinks after a loss, when it grows back. Pure: times
and counts come in as values. Must not know: Ray, torch, clocks, how ranks are started.

Only dp changes. Tensor, pipeline, context and expert degrees stay, and so do the global
batch and the order of the data: with fewer replicas each does more microbatches.
"""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_ray.config.problem import Problem
from megatron_ray.validation import check, resolution
from workers.decisions.placement import PlacementPlan
from workers.decisions.topology.bundles import Bundle
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
    return _bound_problems(spec, dp) or check.find_problems(with_dp(spec, dp))


def legal_dps(spec: JobSpec) -> tuple[int, ...]:
    """Returns the sizes at which an elastic job can run, smallest first."""
    elastic = spec.elastic
    if elastic is None:
        return ()
    # Every replica does the same number of microbatches, so only divisors are checked.
    microbatches = spec.training.batch_sizes.divisor // spec.training.micro_batch_size
    sizes = []
    for dp in range(elastic.min_dp, min(elastic.max_dp, microbatches) + 1):
        if microbatches % dp == 0 and not check.find_problems(with_dp(spec, dp)):
            sizes.append(dp)
    return tuple(sizes)


def _bound_problems(spec: JobSpec, dp: int, remedy: str = "") -> list[Problem]:
    """Returns a problem for a size outside of the bounds that a spec sets."""
    elastic = spec.elastic
    if elastic is None or elastic.min_dp <= dp <= elastic.max_dp:
        return []
    detail = (
        f"dp={dp} is outside elastic.min_dp={elastic.min_dp} to elastic.max_dp="
        f"{elastic.max_dp}{remedy}"
    )
    return [Problem("/parallel/dp", "elastic_bounds", detail)]


def elastic_problems(spec: JobSpec) -> list[Problem]:
    """Returns what is wrong with `elastic`, given the rest of the spec."""
    elastic = spec.elastic
    if elastic is None:
        return []
    if spec.parallel.jobs > 1:
        detail = (
            "the other jobs of parallel.local_sgd.rendezvous need as many replicas as this "
            "one; leave elastic out: the others go on when this job is lost"
        )
        return [Problem("/elastic", "rendezvous", detail)]
    dp = spec.parallel.dp
    if dp != "auto":
        problems = _bound_problems(spec, dp, "; set a dp between them, or auto")
        if problems:
            return problems
    if legal_dps(spec):
        return []
    training = spec.training
    sizes = f"global_batch_size={training.global_batch_size}"
    if training.rampup_batch_size is not None:
        sizes += " and each batch size of rampup_batch_size"
    detail = (
        f"no dp from {elastic.min_dp} to {elastic.max_dp} is possible: micro_batch_size x dp "
        f"must divide {sizes} "
        f"(micro_batch_size={training.micro_batch_size}), and the layout must allow it"
    )
    return [Problem("/elastic", "elastic_sizes", detail)]


# ---- shrinking after a loss


@dataclass(frozen=True)
class Shortage:
    """The resources of a job that waits for lost ones."""

    bundle_size: int
    """Ranks of each bundle."""
    ranks: int
    """Ranks for which it still holds the resources, in whole islands."""
    has_room: bool
    """Whether the living nodes could hold the whole job if no other ran."""
    waited_s: float
    """Seconds since the job began to wait."""


def shrunk_dp(spec: JobSpec, shortage: Shortage) -> int | None:
    """Returns the size at which a job goes on without the lost resources.

    None: it waits for them, or cannot run with what is left.
    """
    # With room elsewhere, Ray replaces a lost bundle within seconds.
    if shortage.has_room and shortage.waited_s < REPLACE_S:
        return None
    sizes = []
    for dp in legal_dps(spec):
        ranks = resolution.world_size(with_dp(spec, dp))
        is_smaller = dp != spec.parallel.dp and ranks <= shortage.ranks
        # A bundle is used whole or not at all.
        if is_smaller and ranks % shortage.bundle_size == 0:
            sizes.append(dp)
    return max(sizes, default=None)


def whole_islands(
    plan: PlacementPlan, present: Collection[int], living: Collection[int]
) -> list[Bundle]:
    """Returns the bundles of islands that are wholly there, those with living ranks first.

    `present` are the indices of bundles on living nodes, `living` those of bundles with
    a living rank. Where an island spans nodes, its bundles follow each other.
    """
    num = max(1, plan.dims.tp // plan.bundle_size)
    islands = [
        plan.bundles[first : first + num] for first in range(0, len(plan.bundles), num)
    ]
    whole = []
    for island in islands:
        if all(bundle.index in present for bundle in island):
            whole.append(island)
    whole.sort(key=lambda island: (island[0].index not in living, island[0].index))
    return [bundle for island in whole for bundle in island]


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
