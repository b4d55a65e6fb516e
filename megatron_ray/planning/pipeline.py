"""Simulates schedules for planning, with a short step that represents a long one.

Schedules repeat themselves after some microbatches, so that a step with thousands of
them need not be simulated in full. Pure. Must not know: torch, bytes, seconds.
"""

from dataclasses import replace
from functools import lru_cache

from megatron_ray.pipeline_parallel.schedules.actions import Op
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan
from megatron_ray.pipeline_parallel.schedules.simulation import (
    EQUAL,
    Costs,
    simulate_computing,
)

_ROUNDS = 2
"""Rounds of pp microbatches after which every schedule repeats itself."""
_ROUNDS_IN_PAIRS = 3
"""Such rounds of schedules in pairs, which keep twice as many microbatches."""


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
    count = _short(pipeline, num_microbatches)
    # GPipe keeps all microbatches of a step at once, and interleaving enlarges its groups
    # by a remainder, so these two must be simulated in full.
    if schedule == "gpipe" or (schedule == "interleaved" and num_microbatches % pp):
        count = num_microbatches
    return _kept_and_released(replace(pipeline, contents=()), count, pp_rank)


@lru_cache(maxsize=1024)
def _kept_and_released(pipeline: PipelinePlan, count: int, pp_rank: int) -> tuple[int, ...]:
    events = []
    for action in pipeline.orders(count)[pp_rank]:
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
    if pipeline.stages.num_stages == 1:
        return 0.0
    count = _short(pipeline, num_microbatches)
    return _bubble(replace(pipeline, contents=()), count, costs)


def bubble_share(pipeline: PipelinePlan, num_microbatches: int) -> float:
    """Returns the share of a step in which a rank is idle.

    Forward pass, input gradients and weight gradients are assumed to take equally long.
    """
    idle = bubble(pipeline, num_microbatches)
    return idle / (idle + num_microbatches * EQUAL.microbatch)


def _short(pipeline: PipelinePlan, num_microbatches: int) -> int:
    pp = pipeline.stages.pp
    rounds = _ROUNDS
    if pipeline.in_pairs:
        rounds = _ROUNDS_IN_PAIRS
    # The remainder stays, because some schedules treat an incomplete round differently.
    return min(num_microbatches, rounds * pp + num_microbatches % pp)


@lru_cache(maxsize=256)
def _bubble(pipeline: PipelinePlan, count: int, costs: Costs) -> float:
    return simulate_computing(pipeline.orders(count), pipeline.stages, costs).bubble
