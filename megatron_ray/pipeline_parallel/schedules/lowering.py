"""Adds sends and receives to the computing actions of every rank.

Owns: the positions of sends and receives in the lists. Pure; must not know: torch.

NCCL has neither tags nor buffers: between two ranks the k-th operation of one must
match the k-th of the other. So the messages of each pair are ordered by the times at
which an ideal run at equal costs produces them, and both ranks post their sends and
receives in this order. A send follows directly after the action that produces it; a
receive is posted one computing action ahead of its use, or earlier if the order
requires it. Passes that are interleaved count as one action. This needs no extra
buffers, and no rank waits because of the order.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_ray.pipeline_parallel.schedules.actions import (
    Action,
    Op,
    Order,
    StageMap,
    in_units,
)
from megatron_ray.pipeline_parallel.schedules.simulation import EQUAL, run_computing


class _Message(NamedTuple):
    """One transfer; compares by the order of transfers between a pair of ranks.

    Fields after the time break ties in the same way on both ranks.
    """

    time: float
    source: int
    backward: bool
    stage: int
    """The stage that produces the message."""
    microbatch: int
    target: int


class _Post(NamedTuple):
    """One side of a message in a rank's list; compares by position, then by message.

    Positions of computing actions are 0, 1, 2 ..., the same for those that are
    interleaved; posts are at half positions between them.
    """

    place: float
    message: _Message
    action: Action


_Use = tuple[bool, int, int]
"""(backward, chunk, microbatch) of the computing action that produces or uses a message."""


def lower(orders: Sequence[Order], stages: StageMap) -> list[Order]:
    """Returns the complete lists of all ranks.

    Raises ScheduleError when the computing actions alone deadlock.
    """
    queues: dict[int, dict[int, list[_Message]]] = defaultdict(lambda: defaultdict(list))
    for message in sorted(_messages(orders, stages)):
        queues[message.source][message.target].append(message)
        queues[message.target][message.source].append(message)
    return [_insert(rank, order, stages, queues[rank]) for rank, order in enumerate(orders)]


def lower_one(orders: Sequence[Order], stages: StageMap, rank: int) -> Order:
    """Returns one rank's complete list, as `lower` does, with less work.

    Raises ScheduleError likewise.
    """
    messages = []
    for message in _messages(orders, stages):
        if rank in (message.source, message.target):
            messages.append(message)
    queues: dict[int, list[_Message]] = defaultdict(list)
    for message in sorted(messages):
        if message.source == rank:
            queues[message.target].append(message)
        else:
            queues[message.source].append(message)
    return _insert(rank, orders[rank], stages, queues)


def _messages(orders: Sequence[Order], stages: StageMap) -> Iterator[_Message]:
    """Yields all transfers between ranks, each with the time of its production."""
    ends, _ = run_computing(orders, stages, EQUAL)
    for (stage, op, microbatch), time in ends.items():
        backward = op is Op.BACKWARD
        to_stage = stage - 1 if backward else stage + 1
        # The last stage's output is the loss, and the first stage's input has no gradient.
        if not 0 <= to_stage < stages.num_stages:
            continue
        source, _ = stages.rank_and_chunk(stage)
        target, _ = stages.rank_and_chunk(to_stage)
        if source != target:
            yield _Message(time, source, backward, stage, microbatch, target)


def _insert(
    rank: int, order: Order, stages: StageMap, queues: dict[int, list[_Message]]
) -> Order:
    """Inserts a rank's sends and receives between its computing actions.

    `queues` are the ordered messages that it exchanges with each peer.
    """
    # A weight gradient needs no message and produces none.
    places: dict[_Use, int] = {}
    units = list(in_units(order))
    for place, unit in enumerate(units):
        for action in unit:
            if action.op is not Op.BACKWARD_WEIGHT:
                backward = action.op is not Op.FORWARD
                places[backward, action.chunk, action.microbatch] = place
    posts: list[_Post] = []
    for queue in queues.values():
        posts += _posts(rank, queue, stages, places)
    # Posts to different peers in the same gap are sorted by message, an order that is the
    # same for all ranks.
    by_gap: dict[int, list[Action]] = defaultdict(list)
    for post in sorted(posts):
        by_gap[int(post.place + 0.5)].append(post.action)
    lowered: Order = []
    for place, unit in enumerate(units):
        lowered += by_gap[place] + unit
    # Posts after the last computing action send its results.
    return lowered + by_gap[len(units)]


def _posts(
    rank: int, queue: Sequence[_Message], stages: StageMap, places: dict[_Use, int]
) -> list[_Post]:
    """Chooses the positions of a rank's posts for one pair's queue, in its order."""
    # Forward through the queue: a post cannot precede the computation of its content, nor
    # any earlier post of the queue.
    earliest = -0.5
    limits: list[tuple[float, float]] = []
    actions: list[Action] = []
    for message in queue:
        if message.source == rank:
            action = _send(message, stages)
            earliest = places[message.backward, action.chunk, action.microbatch] + 0.5
            best = earliest
        else:
            action = _receive(message, stages)
            # One computing action ahead of its use, with which the transfer overlaps.
            best = places[message.backward, action.chunk, action.microbatch] - 1.5
        limits.append((earliest, best))
        actions.append(action)
    # Backward through the queue: each post is at its best position, unless a later post
    # must be earlier. Then it moves forward too, but not before its earliest position.
    posts = []
    latest = float("inf")
    for index in reversed(range(len(queue))):
        earliest, best = limits[index]
        latest = max(earliest, min(best, latest))
        posts.append(_Post(latest, queue[index], actions[index]))
    return posts


def _send(message: _Message, stages: StageMap) -> Action:
    _, chunk = stages.rank_and_chunk(message.stage)
    op = Op.SEND_BACKWARD if message.backward else Op.SEND_FORWARD
    return Action(op, chunk, message.microbatch, message.target)


def _receive(message: _Message, stages: StageMap) -> Action:
    """Returns the receive by the stage that uses the message."""
    to_stage = message.stage - 1 if message.backward else message.stage + 1
    _, chunk = stages.rank_and_chunk(to_stage)
    op = Op.RECV_BACKWARD if message.backward else Op.RECV_FORWARD
    return Action(op, chunk, message.microbatch, message.source)
