"""Starts the ranks of an attempt, and ends those of the previous one.

Owns: the order of workers, rank map, store and start orders. Must not know: what follows
a start that fails, HTTP, torch.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from workers.decisions.failures import Failure
from workers.decisions.observations import AttemptFailed, RanksStarted, StopRequested
from workers.decisions.placement import PlacementPlan, RankPlace
from workers.decisions.rank_map import assign_ranks
from workers.decisions.slot_assignment import SlotAssignment, assign_slots
from workers.driver.attempt.copy_choice import CopyChoice
from workers.driver.context import JobContext
from workers.driver.journal import start_orders
from workers.protocol.states import AttemptState, JobState
from workers.protocol.wording import counted
from workers.ray.answers import WorkerGroupError

_START_TIMEOUT_S = 180.0
_LEAVE_TIMEOUT_S = 6.0
_LOOK_UP_S = 2.0


class _StartCancelled(Exception):  # noqa: N818 - leaves the group's blocking calls
    """The job was cancelled or paused while the ranks were starting."""

    def __init__(self, request: StopRequested) -> None:
        super().__init__()
        self.request = request


@dataclass
class StartTiming:
    """The durations of a start's parts, for the history."""

    seconds: dict[str, float] = field(default_factory=dict)
    promoted: list[RankPlace] = field(default_factory=list)
    """Ranks that run in processes that were spares."""


class RankStarter:
    """Starts and ends the ranks of one job's attempts."""

    def __init__(self, job: JobContext) -> None:
        self._job = job
        self._group = job.ports.group
        self._clock = job.ports.clock
        self._copies = CopyChoice(job)
        self._timing: StartTiming | None = None

    def start(self, plan: PlacementPlan) -> RanksStarted | AttemptFailed | StopRequested:
        """Starts the attempt of the journal; a start that fails is a failed attempt."""
        job = self._job
        # A recovery is one state to users, whatever its parts.
        if job.records.last_state is not JobState.RECOVERING:
            job.records.state(JobState.STARTING)
        job.records.attempt(
            AttemptState.STARTING, job.world_size, None, _describe_begin(job)
        )
        try:
            self._timing = self._start_ranks(plan)
        except _StartCancelled as cancelled:
            return cancelled.request
        except WorkerGroupError as error:
            # Their slots are started anew by the next attempt; the others are reused.
            self._group.kill_slots(error.dead_slots)
            return AttemptFailed(Failure(error.kind, f"the ranks did not start: {error}"))
        return RanksStarted()

    def record_start(self) -> None:
        """Records a journaled start, so that a repeated start is recorded once."""
        # None after a restart: the earlier incarnation has recorded its own start.
        if self._timing is None:
            return
        timing = self._timing
        self._timing = None
        message = f"{counted(len(self._job.entry.ranks), 'rank')} started"
        ranks = []
        for place in timing.promoted:
            ranks.append(place.rank)
            message += f"; rank {place.rank} runs in a spare process (pid {place.pid})"
        data = {**timing.seconds, "promoted": ranks}
        self._job.records.event("ranks.started", message, data=data)

    def free_ranks(self, silent_ranks: Collection[int] = ()) -> tuple[int, ...]:
        """Makes all living ranks leave their process groups and ends those that cannot.

        Silent ranks are ended at once. Returns the slots whose process can be reused.
        """
        # Waiting for answers of a frozen node would only delay the recovery.
        silent_slots = []
        for place in self._job.entry.ranks:
            if place.rank in silent_ranks:
                silent_slots.append(place.slot)
        self._group.kill_slots(silent_slots)
        # All at once: a rank blocked in a collective leaves it when its peers close
        # their connections. Otherwise it would wait for the collective's timeout.
        free, late = self._group.leave(self._job.fence, _LEAVE_TIMEOUT_S)
        unfreed_slots = set(self._group.slots).difference(free)
        self._group.kill_slots(sorted(unfreed_slots))
        self._end_processes({*silent_slots, *late})
        return free

    def _end_processes(self, slots: Collection[int]) -> None:
        """Ends processes that Ray's kill has not reached: they would keep their resources."""
        pids: dict[str, list[int]] = {}
        for place in self._job.entry.ranks:
            if place.slot in slots:
                pids.setdefault(place.node_id, []).append(place.pid)
        self._job.ports.end_processes(pids)

    def end_other_versions(self) -> None:
        """Ends processes that run another version of the code than this driver.

        They may not support this driver's calls.
        """
        if self._job.entry.code_version != self._job.ports.code_version:
            self._group.kill_slots(self._group.slots)

    def _start_ranks(self, plan: PlacementPlan) -> StartTiming:
        """Raises WorkerGroupError, _StartCancelled."""
        job = self._job
        timing = StartTiming()
        # Get-or-create throughout, so that a repeated start reuses what the first one
        # created.
        began = self._clock()
        assignment = self._assign(plan)
        # Before new ones are created, because these may hold resources of the same
        # bundle.
        self._group.kill_slots(assignment.released)
        self._group.create(
            plan, assignment.workers_to_start, job.spec.resources.num_threads
        )
        facts = self._group.probe(
            assignment.slots, job.fence, _START_TIMEOUT_S, self._check_stop
        )
        began = self._record_duration(timing, "probe", began)
        places = assign_ranks(
            assignment.apply(facts), plan.dims, job.entry.ranks, size=plan.bundle_size
        )
        store = None
        # Rank 0 serves the store. An attempt ends when any of its ranks ends, and the
        # next attempt opens a new store. A single rank needs none.
        if job.world_size > 1:
            store = self._group.open_store(
                places[0].slot, job.fence, _START_TIMEOUT_S, self._check_stop
            )
        began = self._record_duration(timing, "store", began)
        # The map is journaled before any rank starts: a restarted driver must find
        # every process that may be training.
        copies = self._copies.confirm(places)
        job.write(ranks=places, store=store, copies=copies)
        job.records.ranks(places)
        orders = start_orders(job.entry, plan.accelerator)
        self._group.start(job.fence, orders, _START_TIMEOUT_S, self._check_stop)
        self._record_duration(timing, "start", began)
        for place in places:
            if place.slot in assignment.promoted:
                timing.promoted.append(place)
        return timing

    def _assign(self, plan: PlacementPlan) -> SlotAssignment:
        """Chooses the attempt's processes among living ones and new ones."""
        slots = self._job.unmapped_slots()
        # Processes that do not answer in time are released: starting new ones is faster
        # than waiting.
        unmapped, _ = self._group.look_up(slots, self._job.fence, _LOOK_UP_S)
        nodes = self._group.nodes(plan)
        places = self._job.entry.ranks
        return assign_slots(plan, places, self._group.slots, unmapped, nodes)

    def _record_duration(self, timing: StartTiming, part: str, began: float) -> float:
        now = self._clock()
        timing.seconds[part] = round(now - began, 3)
        return now

    def _check_stop(self) -> None:
        """Called by the group while it waits. Raises _StartCancelled, DriverReplacedError."""
        request = self._job.stop_requested()
        if request is not None:
            raise _StartCancelled(request)


def _describe_begin(job: JobContext) -> str:
    """Describes from which step the attempt starts; `megatron-ray show` prints it."""
    if job.entry.copies is not None:
        return f"from peer copies of step {job.entry.copies.step}"
    if job.entry.last_commit:
        return f"from checkpoint step {job.entry.last_commit}"
    return "from step 0"
