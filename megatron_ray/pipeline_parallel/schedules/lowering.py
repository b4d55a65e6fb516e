"""Adds sends and receives to the computing actions of every rank.

Owns: where sends and receives stand in the lists. Pure; must not know: torch.

NCCL knows neither tags nor buffers: between two ranks the k-th operation of one must be
the counterpart of the k-th of the other. So the messages of each pair get one order,
that of the times at which an undisturbed run at equal costs produces them, and both
ranks post their sends and receives in it. A send stands right behind the action that
produces it, a receive one computing action ahead of its use, or earlier where the order
asks for it: no more buffers than needed, and no rank waits for an order's sake.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_ray.pipeline_parallel.schedules.actions import Action, Op, Order, StageMap
from megatron_ray.pipeline_parallel.schedules.simulation import EQUAL, run_computing


class _Message(NamedTuple):
    """One transfer; compares by the order in which a pair of ranks exchanges them.

    Fields behind the time only make the order of equal times the same on both ranks.
    """

    time: float
    source: int
    backward: bool
    stage: int
    """The stage that produces it."""
    microbatch: int
    target: int


class _Post(NamedTuple):
    """One side of a message in a rank's list; compares by place, then by message.

    Places of computing actions are 0, 1, 2 ...; posts stand at the halves between them.
    """

    place: float
    message: _Message
    action: Action


_Use = tuple[bool, int, int]
"""(backward, chunk, microbatch) of the computing action that produces or uses a message."""


def lower(orders: Sequence[Order], stages: StageMap) -> list[Order]:
    """Returns every rank's whole list.

    Raises ScheduleError when the computing actions alone would never end.
    """
    queues: dict[int, dict[int, list[_Message]]] = defaultdict(lambda: defaultdict(list))
    for message in sorted(_messages(orders, stages)):
        queues[message.source][message.target].append(message)
        queues[message.target][message.source].append(message)
    return [_insert(rank, order, stages, queues[rank]) for rank, order in enumerate(orders)]


def lower_one(orders: Sequence[Order], stages: StageMap, rank: int) -> Order:
    """Returns one rank's whole list: the same as that of `lower`, with less work.

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
    """Yields every transfer between two ranks, with the time at which it is produced."""
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

    `queues` are the messages that it exchanges with each peer, in their order.
    """
    # A weight gradient neither needs a message nor makes one.
    places: dict[_Use, int] = {}
    for place, action in enumerate(order):
        if action.op is not Op.BACKWARD_WEIGHT:
            backward = action.op is not Op.FORWARD
            places[backward, action.chunk, action.microbatch] = place
    posts: list[_Post] = []
    for queue in queues.values():
        posts += _posts(rank, queue, stages, places)
    # Posts to different peers may share a gap. They stand in it as messages compare, which
    # is one order for all ranks.
    by_gap: dict[int, list[Action]] = defaultdict(list)
    for post in sorted(posts):
        by_gap[int(post.place + 0.5)].append(post.action)
    lowered: Order = []
    for place, action in enumerate(order):
        lowered += by_gap[place]
        lowered.append(action)
    # Behind the last computing action, what it has produced.
    return lowered + by_gap[len(order)]


def _posts(
    rank: int, queue: Sequence[_Message], stages: StageMap, places: dict[_Use, int]
) -> list[_Post]:
    """Decides where a rank posts its side of one pair's queue, in the queue's order."""
    # Forward through the queue: a post cannot stand before what it sends is computed, nor
    # before any earlier post of the queue.
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
            # One computing action ahead of its use, so that it arrives meanwhile.
            best = places[message.backward, action.chunk, action.microbatch] - 1.5
        limits.append((earliest, best))
        actions.append(action)
    # Backward through the queue: each post stands where it is best, unless a later one
    # must stand earlier. Then it moves ahead too, but never before its own earliest place.
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
    """Returns the receive of the stage behind the one that produces the message."""
    to_stage = message.stage - 1 if message.backward else message.stage + 1
    _, chunk = stages.rank_and_chunk(to_stage)
    op = Op.RECV_BACKWARD if message.backward else Op.RECV_FORWARD
    return Action(op, chunk, message.microbatch, message.source)
