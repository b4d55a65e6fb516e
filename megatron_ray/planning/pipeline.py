"""Simulates schedules for planning, with a short step that represents a long one.

Schedules repeat themselves after some microbatches, so that a step with thousands of
them need not be simulated in full. Pure. Must not know: torch, bytes, seconds.
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
"""Rounds of pp microbatches after which every schedule repeats itself."""


def kept_and_released(
    pipeline: PipelinePlan, num_microbatches: int, pp_rank: int
) -> tuple[int, ...]:
    """Returns when a rank keeps and releases the activations of a microbatch, in order.

    An entry is chunk + 1 where it begins to keep a microbatch's activations in a chunk,
    and -(chunk + 1) where it releases them. They are those of a step that keeps as many
    at once as a step of `num_microbatches`.
    """
    schedule = pipeline.schedule
    pp = pipeline.stages.pp
    count = _short(pp, num_microbatches)
    # GPipe keeps all microbatches of a step at once, and interleaving enlarges its groups
    # by a remainder, so these two must be simulated in full.
    if schedule == "gpipe" or (schedule == "interleaved" and num_microbatches % pp):
        count = num_microbatches
    return _kept_and_released(schedule, pp, pipeline.stages.vpp, count, pp_rank)


@lru_cache(maxsize=1024)
def _kept_and_released(
    schedule: ScheduleName, pp: int, vpp: int, count: int, pp_rank: int
) -> tuple[int, ...]:
    events = []
    for action in compute_orders(schedule, pp, count, vpp)[pp_rank]:
        if action.op is Op.FORWARD:
            events.append(action.chunk + 1)
        elif action.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
            # With a split backward pass the weight gradient is the last to need them.
            events.append(-(action.chunk + 1))
    return tuple(events)


def bubble(pipeline: PipelinePlan, num_microbatches: int, costs: Costs = EQUAL) -> float:
    """Returns the idle time of the rank with the least work, in the unit of the costs.

    Transfers between stages take no time.
    """
    stages = pipeline.stages
    if stages.num_stages == 1:
        return 0.0
    count = _short(stages.pp, num_microbatches)
    return _bubble(pipeline.schedule, stages.pp, stages.vpp, count, costs)


def bubble_share(pipeline: PipelinePlan, num_microbatches: int) -> float:
    """Returns the share of a step in which a rank is idle.

    Forward pass, input gradients and weight gradients are assumed to take equally long.
    """
    idle = bubble(pipeline, num_microbatches)
    return idle / (idle + num_microbatches * EQUAL.microbatch)


def _short(pp: int, num_microbatches: int) -> int:
    # The remainder stays, because some schedules treat an incomplete round differently.
    return min(num_microbatches, _ROUNDS * pp + num_microbatches % pp)


@lru_cache(maxsize=256)
def _bubble(schedule: ScheduleName, pp: int, vpp: int, count: int, costs: Costs) -> float:
    orders = compute_orders(schedule, pp, count, vpp)
    return simulate_computing(orders, stage_map(schedule, pp, vpp), costs).bubble
