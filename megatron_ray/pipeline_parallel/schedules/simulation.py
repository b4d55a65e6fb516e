"""Simulates a schedule: its duration, its peak of activations, and deadlocks.

Owns: the simulation of lists of actions. Pure; must not know: torch.

There are two simulators. `run_computing` computes the times of computing actions, with
free transfers. `simulate` runs lowered lists with NCCL's semantics: a pair of ranks
shares one queue, to which both sides post sends and receives in their own order. Entry
k completes when both sides have posted it and the two match; there are no tags and no
buffers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ray.exceptions import MegatronRayError
from megatron_ray.pipeline_parallel.schedules.actions import (
    Action,
    Op,
    Order,
    StageMap,
    in_units,
)


class ScheduleError(MegatronRayError):
    """A schedule deadlocks, or its sends and receives do not match.

    The message contains the ranks and actions.
    """


@dataclass(frozen=True)
class Costs:
    """The costs of one microbatch on a rank (all chunks), in any unit of time."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    transfer: float = 0.0

    def by_op(self, vpp: int) -> dict[Op, float]:
        """Returns the computing time of each action on one of `vpp` chunks.

        Sends and receives overlap with computing and take no time of a rank.
        """
        return {
            Op.FORWARD: self.forward / vpp,
            Op.BACKWARD: (self.backward_input + self.backward_weight) / vpp,
            Op.BACKWARD_INPUT: self.backward_input / vpp,
            Op.BACKWARD_WEIGHT: self.backward_weight / vpp,
            Op.SEND_FORWARD: 0.0,
            Op.RECV_FORWARD: 0.0,
            Op.SEND_BACKWARD: 0.0,
            Op.RECV_BACKWARD: 0.0,
        }

    @property
    def microbatch(self) -> float:
        """Cost of forward and backward of one microbatch."""
        return self.forward + self.backward_input + self.backward_weight


EQUAL = Costs()
"""Equal times of forward, input and weight gradients, and free transfers, as usually
assumed in the formulas of papers."""


@dataclass(frozen=True)
class ScheduleResult:
    """The result of a simulation; times are in the unit of its costs."""

    makespan: float
    """Time from the first action of any rank to the last action of all."""
    bubble: float
    """Idle time of the rank with the least work."""
    peak_activations: tuple[int, ...]
    """Maximum number of microbatches (of one chunk) with kept activations, by rank."""


Result = tuple[int, Op, int]
"""(stage, op, microbatch) of a result that another stage may need: FORWARD for
activations, BACKWARD for the gradient of the input, with or without weight
gradients."""


def simulate_computing(
    orders: Sequence[Order], stages: StageMap, costs: Costs = EQUAL
) -> ScheduleResult:
    """Simulates the computing actions; transfers are free. Raises ScheduleError."""
    _, clocks = run_computing(orders, stages, costs)
    return _summarize(orders, clocks, costs.by_op(stages.vpp))


def simulate(
    lists: Sequence[Order], stages: StageMap, costs: Costs = EQUAL
) -> ScheduleResult:
    """Simulates lowered lists with NCCL's semantics.

    Raises ScheduleError for a deadlock, and for a send that does not match the receive.
    """
    return _LoweredSimulator(lists, stages, costs).run()


def run_computing(
    orders: Sequence[Order], stages: StageMap, costs: Costs
) -> tuple[dict[Result, float], list[float]]:
    """Returns the completion time of each result and the end time of each rank.

    Raises ScheduleError for a deadlock.
    """
    simulator = _ComputingSimulator(orders, stages, costs)
    simulator.run()
    return simulator.ends, simulator.clocks


def peak_activations(order: Order) -> int:
    """Returns the peak number of microbatches (per chunk) with kept activations.

    Activations are kept from the forward to the last backward action.
    """
    num_kept = 0
    peak = 0
    for action in order:
        if action.op is Op.FORWARD:
            num_kept += 1
            peak = max(peak, num_kept)
        elif action.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
            num_kept -= 1
    return peak


class _ComputingSimulator:
    """Simulates computing actions; a waiting rank resumes when its input is complete.

    So every action is visited once or twice. The times do not depend on the order in
    which ranks become ready.
    """

    def __init__(self, orders: Sequence[Order], stages: StageMap, costs: Costs) -> None:
        self.ends: dict[Result, float] = {}
        self.clocks = [0.0] * len(orders)
        self._units = [list(in_units(order)) for order in orders]
        self._stages = stages
        self._costs = costs.by_op(stages.vpp)
        self._positions = [0] * len(orders)
        """Index of each rank's next unit."""
        self._waiting: dict[Result, int] = {}
        """The rank that waits for a result; at most one rank needs a result."""
        self._ready = list(range(len(orders)))

    def run(self) -> None:
        while self._ready:
            self._advance(self._ready.pop())
        _check_finished(self._units, self._positions, "at")

    def _advance(self, rank: int) -> None:
        """Runs a rank until it needs a result that is not complete."""
        units = self._units[rank]
        while self._positions[rank] < len(units):
            unit = units[self._positions[rank]]
            start = self._start(rank, unit)
            if start is None:
                return
            clock = start + sum(self._costs[action.op] for action in unit)
            self.clocks[rank] = clock
            self._positions[rank] += 1
            for action in unit:
                if action.op is not Op.BACKWARD_WEIGHT:
                    stage = self._stages.stage(rank, action.chunk)
                    self._finish(_result(action.op, stage, action.microbatch), clock)

    def _start(self, rank: int, unit: Order) -> float | None:
        """Returns when a rank can start; None, and the rank waits, if it cannot yet."""
        clock = self.clocks[rank]
        for action in unit:
            required = _required_result(self._stages, rank, action)
            if required is None:
                continue
            if required not in self.ends:
                self._waiting[required] = rank
                return None
            clock = max(clock, self.ends[required])
        return clock

    def _finish(self, result: Result, clock: float) -> None:
        self.ends[result] = clock
        if result in self._waiting:
            self._ready.append(self._waiting.pop(result))


def _result(op: Op, stage: int, microbatch: int) -> Result:
    if op is Op.FORWARD:
        return stage, Op.FORWARD, microbatch
    return stage, Op.BACKWARD, microbatch


def _required_result(stages: StageMap, rank: int, action: Action) -> Result | None:
    """Returns the result that a rank's action needs from another stage, if any."""
    op = action.op
    microbatch = action.microbatch
    stage = stages.stage(rank, action.chunk)
    if op is Op.FORWARD:
        if stage == 0:
            return None
        return stage - 1, Op.FORWARD, microbatch
    # It depends only on the rank's own backward, which precedes it in the list.
    if op is Op.BACKWARD_WEIGHT:
        return None
    # The last stage's backward starts from the loss.
    if stage + 1 == stages.num_stages:
        return stage, Op.FORWARD, microbatch
    return stage + 1, Op.BACKWARD, microbatch


def _check_finished(
    units: Sequence[Sequence[Order]], positions: Sequence[int], where: str
) -> None:
    """Raises ScheduleError unless every rank has finished its units."""
    blocked = []
    for rank, (own, position) in enumerate(zip(units, positions, strict=True)):
        if position < len(own):
            action = own[position][0]
            blocked.append(
                f"rank {rank} {where} {action.op.name} of chunk {action.chunk}, "
                f"microbatch {action.microbatch}"
            )
    if blocked:
        raise ScheduleError("the schedule deadlocks: " + "; ".join(blocked[:4]))


def _summarize(
    lists: Sequence[Order], clocks: Sequence[float], costs: Mapping[Op, float]
) -> ScheduleResult:
    work = []
    peaks = []
    for order in lists:
        work.append(sum(costs[action.op] for action in order))
        peaks.append(peak_activations(order))
    makespan = max(clocks)
    return ScheduleResult(makespan, makespan - min(work), tuple(peaks))


_Transfer = tuple[Op, int, int]
"""(op, chunk, microbatch) of a send or a receive."""


@dataclass
class _Queue:
    """The transfers that two ranks have posted to each other."""

    posted: dict[int, list[tuple[float, _Transfer]]]
    """Transfers of each rank in its order, each with its post time."""
    completed_at: float = 0.0
    """Completion time of the last entry that both have posted."""


class _LoweredSimulator:
    """Simulates lowered lists with NCCL's semantics."""

    def __init__(self, lists: Sequence[Order], stages: StageMap, costs: Costs) -> None:
        self._lists = lists
        self._units = [list(in_units(order)) for order in lists]
        self._stages = stages
        self._transfer_cost = costs.transfer
        self._costs = costs.by_op(stages.vpp)
        self._clocks = [0.0] * len(lists)
        self._positions = [0] * len(lists)
        self._queues: dict[tuple[int, int], _Queue] = {}
        self._arrived_at: dict[tuple[int, _Transfer], float] = {}
        """Completion time of each receive of a rank."""
        self._waiting: dict[tuple[int, _Transfer], int] = {}
        self._ready = list(range(len(lists)))

    def run(self) -> ScheduleResult:
        while self._ready:
            self._advance(self._ready.pop())
        _check_finished(self._units, self._positions, "before")
        return _summarize(self._lists, self._clocks, self._costs)

    def _advance(self, rank: int) -> None:
        """Runs a rank until it needs a message that has not arrived."""
        units = self._units[rank]
        while self._positions[rank] < len(units):
            unit = units[self._positions[rank]]
            if unit[0].op.is_compute:
                for action in unit:
                    if not self._has_input(rank, action):
                        return
                self._clocks[rank] += sum(self._costs[action.op] for action in unit)
            else:
                self._post(rank, unit[0])
            self._positions[rank] += 1

    def _has_input(self, rank: int, action: Action) -> bool:
        """Returns whether an action can start; advances the rank's clock to its start.

        Input from another rank must have arrived. Input from the same rank is
        available, because it precedes the action in the rank's list.
        """
        required = _required_result(self._stages, rank, action)
        if required is None:
            return True
        source, _ = self._stages.rank_and_chunk(required[0])
        if source == rank:
            return True
        op = Op.RECV_BACKWARD
        if action.op is Op.FORWARD:
            op = Op.RECV_FORWARD
        receive = (rank, (op, action.chunk, action.microbatch))
        if receive not in self._arrived_at:
            self._waiting[receive] = rank
            return False
        self._clocks[rank] = max(self._clocks[rank], self._arrived_at[receive])
        return True

    def _post(self, rank: int, action: Action) -> None:
        pair = (min(rank, action.peer), max(rank, action.peer))
        queue = self._queues.setdefault(pair, _Queue({pair[0]: [], pair[1]: []}))
        own = queue.posted[rank]
        own.append((self._clocks[rank], (action.op, action.chunk, action.microbatch)))
        # The peer has already posted its side of this entry.
        if len(own) <= len(queue.posted[action.peer]):
            self._complete(queue, len(own) - 1, rank, action.peer)

    def _complete(self, queue: _Queue, index: int, rank: int, peer: int) -> None:
        """Completes entry `index`, which both sides have posted."""
        posted_at, transfer = queue.posted[rank][index]
        peer_posted_at, peer_transfer = queue.posted[peer][index]
        if transfer[0].is_send == peer_transfer[0].is_send:
            raise ScheduleError(
                f"operation {index} between ranks {rank} and {peer} is the same on both "
                f"sides: {transfer}, {peer_transfer}"
            )
        if transfer[0].is_send:
            self._check_match(rank, transfer, peer, peer_transfer)
            receive = (peer, peer_transfer)
        else:
            self._check_match(peer, peer_transfer, rank, transfer)
            receive = (rank, transfer)
        # Entries of a pair complete one after another.
        queue.completed_at = (
            max(queue.completed_at, posted_at, peer_posted_at) + self._transfer_cost
        )
        self._arrived_at[receive] = queue.completed_at
        if receive in self._waiting:
            self._ready.append(self._waiting.pop(receive))

    def _check_match(
        self, sender: int, send: _Transfer, receiver: int, receive: _Transfer
    ) -> None:
        """Raises ScheduleError unless the receive matches the send."""
        op, chunk, microbatch = send
        stage = self._stages.stage(sender, chunk)
        if op is Op.SEND_FORWARD:
            target, to_chunk = self._stages.rank_and_chunk(stage + 1)
            expected = (Op.RECV_FORWARD, to_chunk, microbatch)
        else:
            target, to_chunk = self._stages.rank_and_chunk(stage - 1)
            expected = (Op.RECV_BACKWARD, to_chunk, microbatch)
        if target != receiver or receive != expected:
            raise ScheduleError(
                f"rank {sender} sends {(op.name, chunk, microbatch)}, but rank "
                f"{receiver} waits for {(receive[0].name, *receive[1:])}"
            )
