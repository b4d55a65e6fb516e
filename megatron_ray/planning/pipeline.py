"""What of a schedule repeats itself, so that long steps need not be played out.

Owns: choosing a shorter step that stands for a longer one.

Pure. Must not know: torch, bytes, seconds.
"""

from functools import lru_cache

from megatron_ray.pipeline_parallel.schedules.actions import Op
from megatron_ray.pipeline_parallel.schedules.orders import (
    ScheduleName,
    compute_orders,
    stage_map,
)
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan
from megatron_ray.pipeline_parallel.schedules.simulation import (
    EQUAL,
    Costs,
    simulate_computing,
)

_ROUNDS = 2
"""Rounds of pp microbatches after which every schedule only repeats itself."""


def kept_and_released(
    pipeline: PipelinePlan, num_microbatches: int, pp_rank: int
) -> tuple[int, ...]:
    """When a rank begins and ends to keep a microbatch's activations in a chunk, in
    order: chunk + 1, and -(chunk + 1).

    Of a step that keeps as many at once as one of `num_microbatches`.
    """
    schedule = pipeline.schedule
    pp = pipeline.stages.pp
    # GPipe holds them all, and interleaving makes its groups larger by what is left
    # over.
    whole = schedule == "gpipe" or (schedule == "interleaved" and num_microbatches % pp)
    count = num_microbatches if whole else _short(pp, num_microbatches)
    return _kept_and_released(schedule, pp, pipeline.stages.vpp, count, pp_rank)


@lru_cache(maxsize=1024)
def _kept_and_released(
    schedule: ScheduleName, pp: int, vpp: int, count: int, pp_rank: int
) -> tuple[int, ...]:
    signs = {Op.FORWARD: 1, Op.BACKWARD: -1, Op.BACKWARD_WEIGHT: -1}
    order = compute_orders(schedule, pp, count, vpp)[pp_rank]
    return tuple(
        signs[action.op] * (action.chunk + 1) for action in order if action.op in signs
    )


def bubble(pipeline: PipelinePlan, num_microbatches: int, costs: Costs = EQUAL) -> float:
    """Time in which the rank that works least waits, in the unit of the costs: the
    simulator's, transfers free.
    """
    stages = pipeline.stages
    if stages.num_stages == 1:
        return 0.0
    return _bubble(
        pipeline.schedule, stages.pp, stages.vpp, _short(stages.pp, num_microbatches), costs
    )


def bubble_share(pipeline: PipelinePlan, num_microbatches: int) -> float:
    """Share of a step in which a rank waits for others, where forward, input and weight
    gradients take equally long.
    """
    idle = bubble(pipeline, num_microbatches)
    return idle / (idle + num_microbatches * EQUAL.microbatch)


def _short(pp: int, num_microbatches: int) -> int:
    return min(num_microbatches, _ROUNDS * pp + num_microbatches % pp)


@lru_cache(maxsize=256)
def _bubble(schedule: ScheduleName, pp: int, vpp: int, count: int, costs: Costs) -> float:
    return simulate_computing(
        compute_orders(schedule, pp, count, vpp), stage_map(schedule, pp, vpp), costs
    ).bubble
