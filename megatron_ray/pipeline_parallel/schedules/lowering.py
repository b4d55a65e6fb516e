"""From computing actions to everything a rank does.

Owns: where sends, receives, gradient reductions and gathers stand in the lists.

NCCL knows neither tags nor buffers: between two ranks the k-th operation of one must be
the counterpart of the k-th of the other. So the messages of each pair get one order,
that of the times at which an undisturbed run at equal costs produces them, and both
ranks post their sends and receives in it. A send stands right behind the action that
produces it, a receive one computing action ahead of its use, or earlier where the order
asks for it: no more buffers than needed, and nobody waits for an order's sake. Pure;
must not know: torch.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_ray.pipeline_parallel.schedules.actions import Action, Op, Order, StageMap
from megatron_ray.pipeline_parallel.schedules.simulation import EQUAL, run_computing


class _Message(NamedTuple):
    """Sorted as a pair of ranks exchanges them."""

    time: float
    source: int
    backward: bool
    stage: int
    """That produces it."""
    microbatch: int
    target: int


def lower(orders: Sequence[Order], stages: StageMap) -> list[Order]:
    """Every rank's whole list.

    Raises ScheduleError when the computing actions alone would never end.
    """
    queues: dict[int, dict[int, list[_Message]]] = defaultdict(lambda: defaultdict(list))
    for message in sorted(_messages(orders, stages)):
        queues[message.source][message.target].append(message)
        queues[message.target][message.source].append(message)
    return [_place(rank, order, stages, queues[rank]) for rank, order in enumerate(orders)]


def lower_one(orders: Sequence[Order], stages: StageMap, rank: int) -> Order:
    """One rank's list of those; placing the others' is most of the work.

    Raises ScheduleError likewise.
    """
    queues: dict[int, list[_Message]] = defaultdict(list)
    for message in sorted(
        message
        for message in _messages(orders, stages)
        if rank in (message.source, message.target)
    ):
        queues[message.target if message.source == rank else message.source].append(message)
    return _place(rank, orders[rank], stages, queues)


def _messages(orders: Sequence[Order], stages: StageMap) -> Iterator[_Message]:
    ends, _ = run_computing(orders, stages, EQUAL)
    for (stage, op, microbatch), time in ends.items():
        backward = op is Op.BACKWARD
        to = stage - 1 if backward else stage + 1
        if 0 <= to < stages.num_stages:
            source = stages.home(stage)[0]
            target = stages.home(to)[0]
            if source != target:
                yield _Message(time, source, backward, stage, microbatch, target)


def _place(
    rank: int, order: Order, stages: StageMap, queues: dict[int, list[_Message]]
) -> Order:
    """One rank's list: its computing actions at 0, 1, 2 ..., everything else at the
    halves between them.
    """
    index = {
        (action.op is not Op.FORWARD, action.chunk, action.microbatch): place
        for place, action in enumerate(order)
        if action.op is not Op.BACKWARD_WEIGHT
    }
    placed: list[tuple[float, _Message, Action]] = []
    for queue in queues.values():
        placed += _post(rank, queue, stages, index)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for place, action in enumerate(order):
        first.setdefault(action.chunk, place)
        last[action.chunk] = place
    unshards = {place: [Action(Op.UNSHARD, chunk)] for chunk, place in first.items()}
    reductions = {place: [Action(Op.REDUCE_GRADS, chunk)] for chunk, place in last.items()}
    transfers: dict[int, list[Action]] = defaultdict(list)
    for position, _, action in sorted(placed, key=lambda entry: entry[:2]):
        transfers[int(position + 0.5)].append(action)
    lowered: Order = []
    for place in range(len(order) + 1):
        lowered += transfers[place]
        lowered += reductions.get(
            place - 1, []
        )  # behind the send that the next rank waits for
        lowered += unshards.get(place, [])
        lowered += order[place : place + 1]
    return lowered


def _post(
    rank: int,
    queue: Sequence[_Message],
    stages: StageMap,
    index: dict[tuple[bool, int, int], int],
) -> list[tuple[float, _Message, Action]]:
    """Where this rank posts its side of one pair's queue, in the queue's order."""
    entries: list[tuple[float, float, _Message, Action]] = []  # earliest, wanted
    earliest = -0.5
    for message in queue:
        if message.source == rank:
            chunk = stages.home(message.stage)[1]
            earliest = index[message.backward, chunk, message.microbatch] + 0.5
            op = Op.SEND_BACKWARD if message.backward else Op.SEND_FORWARD
            entries.append(
                (
                    earliest,
                    earliest,
                    message,
                    Action(op, chunk, message.microbatch, message.target),
                )
            )
        else:
            chunk = stages.home(message.stage + (-1 if message.backward else 1))[1]
            ahead = index[message.backward, chunk, message.microbatch] - 1.5
            op = Op.RECV_BACKWARD if message.backward else Op.RECV_FORWARD
            entries.append(
                (
                    earliest,
                    ahead,
                    message,
                    Action(op, chunk, message.microbatch, message.source),
                )
            )
    placed = []
    limit = float("inf")
    for low, wanted, message, action in reversed(entries):
        limit = max(low, min(wanted, limit))
        placed.append((limit, message, action))
    return placed
