"""How long a schedule takes, what it holds, and whether it can end at all.

Owns: judging a list of actions. Pure; must not know: torch.

Two machines. `run_computing` gives the times of the computing actions alone, transfers
costing nothing. `simulate` runs the lowered lists as NCCL would: a pair of ranks shares
one queue, both sides put their sends and receives into it in their own order, and entry
k of one side is done when entry k of the other side is there too and matches; there are
no tags and no buffers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ray.exceptions import MegatronRayError
from megatron_ray.pipeline_parallel.schedules.actions import Action, Op, Order, StageMap


class ScheduleError(MegatronRayError):
    """A schedule that never ends, or whose sends and receives do not match; the text
    says where.
    """


@dataclass(frozen=True)
class Costs:
    """Seconds, or any unit, of one whole rank's share (all its chunks) of one
    microbatch.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    transfer: float = 0.0

    def prices(self, vpp: int) -> dict[Op, float]:
        """Of each action on one of a rank's chunks; what is not computing takes no time
        of the rank's.
        """
        both = self.backward_input + self.backward_weight
        computing = {
            Op.FORWARD: self.forward,
            Op.BACKWARD: both,
            Op.BACKWARD_INPUT: self.backward_input,
            Op.BACKWARD_WEIGHT: self.backward_weight,
        }
        return {op: computing.get(op, 0.0) / vpp for op in Op}

    @property
    def microbatch(self) -> float:
        """Forward and backward of one microbatch."""
        return self.forward + self.backward_input + self.backward_weight


EQUAL = Costs()
"""Forward, input and weight gradients take the same time, transfers none: what the
papers' formulas are usually given for."""


@dataclass(frozen=True)
class Outcome:
    """What a schedule comes to."""

    makespan: float
    bubble: float
    """Of the rank that works least: the makespan less its work."""
    peak_activations: tuple[int, ...]
    """By rank: chunks' activations held at once, at most."""


Ends = dict[tuple[int, Op, int], float]
"""(stage, op, microbatch) -> when it ends; op is FORWARD, or BACKWARD for the input
gradient, whole or apart."""


def run_computing(
    orders: Sequence[Order], stages: StageMap, costs: Costs
) -> tuple[Ends, list[float]]:
    """Ends of all forwards and input gradients, and of each rank.

    Raises ScheduleError when ranks wait for each other for ever.
    """
    ends: Ends = {}
    clocks = [0.0] * len(orders)
    places = [0] * len(orders)
    prices = costs.prices(stages.vpp)
    waiting: dict[tuple[int, Op, int], int] = {}
    ready = list(range(len(orders)))
    while ready:
        rank = ready.pop()
        order = orders[rank]
        clock = clocks[rank]
        place = places[rank]
        while place < len(order):
            op, chunk, microbatch, _ = order[place]
            stage = stages.stage(rank, chunk)
            need = _need(op, stage, microbatch, stages.num_stages)
            if need is not None:
                if need not in ends:
                    waiting[need] = rank
                    break
                clock = max(clock, ends[need])
            clock += prices[op]
            place += 1
            if op is not Op.BACKWARD_WEIGHT:
                done = (stage, Op.FORWARD if op is Op.FORWARD else Op.BACKWARD, microbatch)
                ends[done] = clock
                if done in waiting:
                    ready.append(waiting.pop(done))
        clocks[rank] = clock
        places[rank] = place
    _refuse_unfinished(orders, places, "at")
    return ends, clocks


def _refuse_unfinished(lists: Sequence[Order], places: Sequence[int], where: str) -> None:
    """Raises ScheduleError unless every rank has come to the end of its list."""
    unfinished = [
        (rank, order[place])
        for rank, (order, place) in enumerate(zip(lists, places, strict=True))
        if place < len(order)
    ]
    if unfinished:
        stuck = [f"rank {rank} {where} {_words(action)}" for rank, action in unfinished[:4]]
        raise ScheduleError("the schedule never ends: " + "; ".join(stuck))


def _need(
    op: Op, stage: int, microbatch: int, num_stages: int
) -> tuple[int, Op, int] | None:
    """What must have ended on another stage."""
    if op is Op.FORWARD:
        return (stage - 1, Op.FORWARD, microbatch) if stage else None
    if op is Op.BACKWARD_WEIGHT:
        return None
    return (
        (stage + 1, Op.BACKWARD, microbatch)
        if stage + 1 < num_stages
        else (stage, Op.FORWARD, microbatch)
    )


def _words(action: Action) -> str:
    return f"{action.op.name} of chunk {action.chunk}, microbatch {action.microbatch}"


def outcome(orders: Sequence[Order], stages: StageMap, costs: Costs = EQUAL) -> Outcome:
    """Of the computing actions, transfers free. Raises ScheduleError."""
    _, clocks = run_computing(orders, stages, costs)
    return _judge(orders, clocks, costs.prices(stages.vpp))


def _judge(
    lists: Sequence[Order], clocks: Sequence[float], prices: Mapping[Op, float]
) -> Outcome:
    work = min(sum(prices[action.op] for action in order) for order in lists)
    return Outcome(
        max(clocks), max(clocks) - work, tuple(peak_activations(order) for order in lists)
    )


def peak_activations(order: Order) -> int:
    """Most microbatches of chunks between their forward and their last backward on a
    rank.
    """
    held = peak = 0
    for action in order:
        if action.op is Op.FORWARD:
            held += 1
            peak = max(peak, held)
        elif action.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
            held -= 1
    return peak


@dataclass
class _Queue:
    """Of two ranks: what each side has posted and when, and when the last entry that
    both have posted was done.
    """

    posted: dict[int, list[tuple[float, tuple[Op, int, int]]]]
    done: float = 0.0


def simulate(lists: Sequence[Order], stages: StageMap, costs: Costs = EQUAL) -> Outcome:
    """Of lowered lists, on NCCL's terms.

    Raises ScheduleError for a deadlock, and for a send that meets another receive than
    its own.
    """
    return _Machine(lists, stages, costs).run()


class _Machine:
    def __init__(self, lists: Sequence[Order], stages: StageMap, costs: Costs) -> None:
        self._lists = lists
        self._stages = stages
        self._costs = costs
        self._prices = costs.prices(stages.vpp)
        self._clocks = [0.0] * len(lists)
        self._places = [0] * len(lists)
        self._queues: dict[tuple[int, int], _Queue] = {}
        self._arrived: dict[tuple[int, Op, int, int], float] = {}
        self._waiting: dict[tuple[int, Op, int, int], int] = {}
        self._ready = list(range(len(lists)))

    def run(self) -> Outcome:
        while self._ready:
            self._advance(self._ready.pop())
        _refuse_unfinished(self._lists, self._places, "before")
        return _judge(self._lists, self._clocks, self._prices)

    def _advance(self, rank: int) -> None:
        """As far as it comes without a message that is not there."""
        order = self._lists[rank]
        while self._places[rank] < len(order):
            action = order[self._places[rank]]
            if action.op.is_compute:
                if not self._has_input(rank, action):
                    return
                self._clocks[rank] += self._prices[action.op]
            elif action.peer >= 0:
                self._post(rank, action)
            self._places[rank] += 1

    def _has_input(self, rank: int, action: Action) -> bool:
        """Waits for what comes from another rank; what stays on a rank is there, or the
        list is wrong.
        """
        need = _need(
            action.op,
            self._stages.stage(rank, action.chunk),
            action.microbatch,
            self._stages.num_stages,
        )
        if need is None or self._stages.home(need[0])[0] == rank:
            return True
        key = (
            rank,
            Op.RECV_FORWARD if action.op is Op.FORWARD else Op.RECV_BACKWARD,
            action.chunk,
            action.microbatch,
        )
        if key not in self._arrived:
            self._waiting[key] = rank
            return False
        self._clocks[rank] = max(self._clocks[rank], self._arrived[key])
        return True

    def _post(self, rank: int, action: Action) -> None:
        pair = (min(rank, action.peer), max(rank, action.peer))
        queue = self._queues.setdefault(pair, _Queue({pair[0]: [], pair[1]: []}))
        ours = queue.posted[rank]
        theirs = queue.posted[action.peer]
        ours.append((self._clocks[rank], (action.op, action.chunk, action.microbatch)))
        if len(ours) <= len(theirs):
            self._complete(queue, len(ours) - 1, rank, action.peer)

    def _complete(self, queue: _Queue, number: int, rank: int, peer: int) -> None:
        """Entry `number`, which both sides have posted; those before it are done."""
        (at, ours) = queue.posted[rank][number]
        (peer_at, theirs) = queue.posted[peer][number]
        sends = ours[0].is_send
        if theirs[0].is_send == sends:
            raise ScheduleError(
                f"operation {number} between ranks {rank} and {peer} is the same on both "
                f"sides: {ours}, {theirs}"
            )
        sender, receiver = (rank, peer) if sends else (peer, rank)
        (sent, chunk, microbatch), got = (ours, theirs) if sends else (theirs, ours)
        step = 1 if sent is Op.SEND_FORWARD else -1
        home, to = self._stages.home(self._stages.stage(sender, chunk) + step)
        wanted = (Op.RECV_FORWARD if step == 1 else Op.RECV_BACKWARD, to, microbatch)
        if home != receiver or got != wanted:
            raise ScheduleError(
                f"rank {sender} sends {(sent.name, chunk, microbatch)}, but rank "
                f"{receiver} waits for {(got[0].name, *got[1:])}"
            )
        queue.done = max(queue.done, at, peer_at) + self._costs.transfer
        key = (receiver, *got)
        self._arrived[key] = queue.done
        if key in self._waiting:
            self._ready.append(self._waiting.pop(key))
