"""Simulates a schedule: how long it takes, what it keeps, and whether it ends at all.

Owns: judging a list of actions. Pure; must not know: torch.

There are two machines. `run_computing` gives the times of the computing actions alone,
transfers costing nothing. `simulate` runs the lowered lists as NCCL would: a pair of
ranks shares one queue, both sides put their sends and receives into it in their own
order, and entry k of one side is done when entry k of the other side is posted too and
matches; there are no tags and no buffers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ray.exceptions import MegatronRayError
from megatron_ray.pipeline_parallel.schedules.actions import Action, Op, Order, StageMap


class ScheduleError(MegatronRayError):
    """A schedule never ends, or its sends and receives do not match.

    The text names the ranks and actions.
    """


@dataclass(frozen=True)
class Costs:
    """The costs of one microbatch on a whole rank (all its chunks), in any unit of time."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    transfer: float = 0.0

    def by_op(self, vpp: int) -> dict[Op, float]:
        """Returns how long each action keeps a rank busy, on one of its `vpp` chunks.

        Sends and receives go on beside computing and keep no rank busy.
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
"""Forward, input and weight gradients take the same time, transfers none: what the
papers' formulas are usually given for."""


@dataclass(frozen=True)
class ScheduleResult:
    """The result of a simulation; times are in the unit of its costs."""

    makespan: float
    """Time from the first action of any rank to the last action of all."""
    bubble: float
    """Time in which the rank with the least work does nothing."""
    peak_activations: tuple[int, ...]
    """Microbatches of a chunk whose activations are kept at once, at most, by rank."""


Result = tuple[int, Op, int]
"""(stage, op, microbatch) of what another stage may need: FORWARD for activations,
BACKWARD for the gradient of the input, whether weight gradients came with it or not."""


def simulate_computing(
    orders: Sequence[Order], stages: StageMap, costs: Costs = EQUAL
) -> ScheduleResult:
    """Simulates the computing actions; transfers are free. Raises ScheduleError."""
    _, clocks = run_computing(orders, stages, costs)
    return _summarize(orders, clocks, costs.by_op(stages.vpp))


def simulate(
    lists: Sequence[Order], stages: StageMap, costs: Costs = EQUAL
) -> ScheduleResult:
    """Simulates lowered lists as NCCL would run them.

    Raises ScheduleError for a deadlock, and for a send that meets another receive than
    its own.
    """
    return _LoweredMachine(lists, stages, costs).run()


def run_computing(
    orders: Sequence[Order], stages: StageMap, costs: Costs
) -> tuple[dict[Result, float], list[float]]:
    """Returns when each result is complete, and when each rank ends.

    Raises ScheduleError when ranks wait for each other for ever.
    """
    machine = _ComputingMachine(orders, stages, costs)
    machine.run()
    return machine.ends, machine.clocks


def peak_activations(order: Order) -> int:
    """Returns how many microbatches of chunks a rank keeps activations of, at most.

    They are kept from the forward to the last backward action.
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


class _ComputingMachine:
    """Runs computing actions; a rank that waits goes on when its input is complete.

    So every action is looked at once or twice, in whatever order ranks become ready: the
    times do not depend on it.
    """

    def __init__(self, orders: Sequence[Order], stages: StageMap, costs: Costs) -> None:
        self.ends: dict[Result, float] = {}
        self.clocks = [0.0] * len(orders)
        self._orders = orders
        self._stages = stages
        self._costs = costs.by_op(stages.vpp)
        self._places = [0] * len(orders)
        """Index of each rank's next action."""
        self._waiting: dict[Result, int] = {}
        """The rank that waits for a result; no result is needed by two ranks."""
        self._ready = list(range(len(orders)))

    def run(self) -> None:
        while self._ready:
            self._advance(self._ready.pop())
        _check_finished(self._orders, self._places, "at")

    def _advance(self, rank: int) -> None:
        """Runs a rank until it needs a result that is not there yet."""
        order = self._orders[rank]
        clock = self.clocks[rank]
        place = self._places[rank]
        while place < len(order):
            op, chunk, microbatch, _ = order[place]
            stage = self._stages.stage(rank, chunk)
            need = _need(op, stage, microbatch, self._stages.num_stages)
            if need is not None:
                if need not in self.ends:
                    self._waiting[need] = rank
                    break
                clock = max(clock, self.ends[need])
            clock += self._costs[op]
            place += 1
            if op is not Op.BACKWARD_WEIGHT:
                self._finish(_result(op, stage, microbatch), clock)
        self.clocks[rank] = clock
        self._places[rank] = place

    def _finish(self, result: Result, clock: float) -> None:
        self.ends[result] = clock
        if result in self._waiting:
            self._ready.append(self._waiting.pop(result))


def _result(op: Op, stage: int, microbatch: int) -> Result:
    if op is Op.FORWARD:
        return stage, Op.FORWARD, microbatch
    return stage, Op.BACKWARD, microbatch


def _need(op: Op, stage: int, microbatch: int, num_stages: int) -> Result | None:
    """Returns the result that an action needs, None where it needs no other stage's."""
    if op is Op.FORWARD:
        if stage == 0:
            return None
        return stage - 1, Op.FORWARD, microbatch
    # It depends on the rank's own backward only, which its list puts before it already.
    if op is Op.BACKWARD_WEIGHT:
        return None
    # The last stage's backward starts from the loss.
    if stage + 1 == num_stages:
        return stage, Op.FORWARD, microbatch
    return stage + 1, Op.BACKWARD, microbatch


def _check_finished(lists: Sequence[Order], places: Sequence[int], where: str) -> None:
    """Raises ScheduleError unless every rank has come to the end of its list."""
    stuck = []
    for rank, (order, place) in enumerate(zip(lists, places, strict=True)):
        if place < len(order):
            op, chunk, microbatch, _ = order[place]
            stuck.append(
                f"rank {rank} {where} {op.name} of chunk {chunk}, microbatch {microbatch}"
            )
    if stuck:
        raise ScheduleError("the schedule never ends: " + "; ".join(stuck[:4]))


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
    """Transfers of each rank in its order, each with the time of its post."""
    done: float = 0.0
    """Time at which the last entry that both have posted was done."""


class _LoweredMachine:
    """Runs lowered lists; the one machine that knows NCCL's terms."""

    def __init__(self, lists: Sequence[Order], stages: StageMap, costs: Costs) -> None:
        self._lists = lists
        self._stages = stages
        self._transfer_cost = costs.transfer
        self._costs = costs.by_op(stages.vpp)
        self._clocks = [0.0] * len(lists)
        self._places = [0] * len(lists)
        self._queues: dict[tuple[int, int], _Queue] = {}
        self._arrived: dict[tuple[int, _Transfer], float] = {}
        """Time at which each receive of a rank was done."""
        self._waiting: dict[tuple[int, _Transfer], int] = {}
        self._ready = list(range(len(lists)))

    def run(self) -> ScheduleResult:
        while self._ready:
            self._advance(self._ready.pop())
        _check_finished(self._lists, self._places, "before")
        return _summarize(self._lists, self._clocks, self._costs)

    def _advance(self, rank: int) -> None:
        """Runs a rank until it needs a message that is not there yet."""
        order = self._lists[rank]
        while self._places[rank] < len(order):
            action = order[self._places[rank]]
            if action.op.is_compute:
                if not self._has_input(rank, action):
                    return
                self._clocks[rank] += self._costs[action.op]
            else:
                self._post(rank, action)
            self._places[rank] += 1

    def _has_input(self, rank: int, action: Action) -> bool:
        """Returns whether an action can start; moves the rank's clock to when it can.

        What comes from another rank must have arrived. What stays on a rank is there: the
        list of one rank is in an order in which it can be.
        """
        stage = self._stages.stage(rank, action.chunk)
        need = _need(action.op, stage, action.microbatch, self._stages.num_stages)
        if need is None:
            return True
        source, _ = self._stages.rank_and_chunk(need[0])
        if source == rank:
            return True
        op = Op.RECV_BACKWARD
        if action.op is Op.FORWARD:
            op = Op.RECV_FORWARD
        receive = (rank, (op, action.chunk, action.microbatch))
        if receive not in self._arrived:
            self._waiting[receive] = rank
            return False
        self._clocks[rank] = max(self._clocks[rank], self._arrived[receive])
        return True

    def _post(self, rank: int, action: Action) -> None:
        pair = (min(rank, action.peer), max(rank, action.peer))
        queue = self._queues.setdefault(pair, _Queue({pair[0]: [], pair[1]: []}))
        own = queue.posted[rank]
        own.append((self._clocks[rank], (action.op, action.chunk, action.microbatch)))
        # The peer has posted its side of this entry already, so both are posted now.
        if len(own) <= len(queue.posted[action.peer]):
            self._complete(queue, len(own) - 1, rank, action.peer)

    def _complete(self, queue: _Queue, number: int, rank: int, peer: int) -> None:
        """Completes entry `number`, which both sides have posted; those before it are."""
        posted_at, transfer = queue.posted[rank][number]
        peer_posted_at, peer_transfer = queue.posted[peer][number]
        if transfer[0].is_send == peer_transfer[0].is_send:
            raise ScheduleError(
                f"operation {number} between ranks {rank} and {peer} is the same on both "
                f"sides: {transfer}, {peer_transfer}"
            )
        if transfer[0].is_send:
            self._check_match(rank, transfer, peer, peer_transfer)
            receive = (peer, peer_transfer)
        else:
            self._check_match(peer, peer_transfer, rank, transfer)
            receive = (rank, transfer)
        # Entries of a pair are done one after another.
        queue.done = max(queue.done, posted_at, peer_posted_at) + self._transfer_cost
        self._arrived[receive] = queue.done
        if receive in self._waiting:
            self._ready.append(self._waiting.pop(receive))

    def _check_match(
        self, sender: int, send: _Transfer, receiver: int, receive: _Transfer
    ) -> None:
        """Raises ScheduleError unless the receive is the one that the send is for."""
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
