"""Observes the ranks of one attempt.

Owns: the one outstanding poll per rank, cursors and logs, the failures so far. Must not
know: what follows from a failure, checkpoints, the service.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from workers.decisions import liveness
from workers.decisions.failures import Failure, FailureKind, describe_error
from workers.decisions.liveness import Progress
from workers.decisions.placement import RankPlace
from workers.decisions.ranks.stragglers import Pace
from workers.driver.attempt.plan import AttemptPlan
from workers.driver.logs import JobLogs
from workers.driver.ports import JobPorts
from workers.rank.messages import NextReply, Poll, RankState
from workers.rank.spool import Line
from workers.ray.deaths import Death
from workers.ray.worker_group import PollResult, WorkerGroup

_WAIT_S = 2.0
_LOG_BYTES = 64 << 10
"""Limit of one rank's log in one answer."""
_TOTAL_LOG_BYTES = 4 << 20
"""Limit of all ranks' logs in one round of answers."""


@dataclass
class RankView:
    """The last known condition of one rank."""

    place: RankPlace
    answered_at: float
    log_offset: int
    cursor: int | None = None
    """Highest report number received; None: start after the last released one."""
    released: int = 0
    """Reports up to here are in a committed checkpoint."""
    state: RankState = RankState.RUNNING
    num_reports: int = 0
    pace: Pace = field(default_factory=Pace)


class RankMonitor:
    """The ranks of one attempt, as the driver observes them.

    `stored` returns the highest number of rank 0's reports that the service has.
    """

    def __init__(
        self, plan: AttemptPlan, ports: JobPorts, stored: Callable[[], int]
    ) -> None:
        self._plan = plan
        self._group: WorkerGroup = ports.group
        self._logs: JobLogs = ports.logs
        self._clock = ports.clock
        self._stored = stored
        now = self._clock()
        self._progress = Progress(now, is_starting=True)
        self._views: dict[int, RankView] = {}
        for place in plan.places:
            # Logs continue where an earlier incarnation stopped writing.
            offset = self._logs.size(plan.attempt, place.rank)
            self._views[place.rank] = RankView(place, now, offset)
        self.failures: list[Failure] = []
        self.dead: set[int] = set()
        """Ranks whose process has died."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the attempt."""
        return tuple(self._views)

    @property
    def states(self) -> set[RankState]:
        """The states that ranks are in."""
        return {view.state for view in self._views.values()}

    @property
    def paces(self) -> dict[int, Pace]:
        """The newest pace of each rank."""
        return {rank: view.pace for rank, view in self._views.items()}

    def start(self) -> None:
        """Starts the first poll of every rank."""
        for view in self._views.values():
            self._poll(view)

    def collect(self, timeout_s: float) -> list[tuple[int, list[Line]]]:
        """Processes the replies that have arrived and polls those ranks again.

        Returns the reports by rank, in the order of their arrival. Raises FencedError
        when this driver was replaced.
        """
        reports = []
        # One poll per rank is outstanding. A reply brings reports, log and liveness; a
        # failed poll means a dead rank, a late reply a silent one.
        for answer in self._group.collect(timeout_s):
            view = self._views[answer.rank]
            view.answered_at = self._clock()
            if answer.reply is None:
                self._handle_death(view, answer)
            else:
                self._handle_reply(view, answer.reply)
                reports.append((answer.rank, answer.reply.lines))
        return reports

    @property
    def quiet_s(self) -> float:
        """Seconds since a rank has last reported anything."""
        return self._clock() - self._progress.last_at

    def hang(self) -> str | None:
        """Returns a sentence when no rank has reported anything for too long."""
        # Ranks wait for each other in every step, so in a hang no rank makes progress.
        if all(view.state.is_over for view in self._views.values()):
            return None
        return liveness.hang(self._clock(), self._progress, self._plan.hang_timeout_s)

    def check_clock(self, *, has_stepped: bool) -> None:
        """Adds failures for ranks that are silent too long."""
        now = self._clock()
        limit_s = liveness.silence_limit_s(has_stepped=has_stepped)
        answered_at = {}
        node_of = {}
        for rank, view in self._views.items():
            if not view.state.is_over:
                answered_at[rank] = view.answered_at
                node_of[rank] = view.place.node_id
        silent = liveness.silent_with_nodes(now, answered_at, node_of, limit_s)
        answering = {node_of[rank] for rank in answered_at if rank not in silent}
        for rank in silent:
            place = self._views[rank].place
            # Of a node that still answers only this process is frozen.
            subject = f"node {place.address}"
            if place.node_id in answering:
                subject = f"its process (pid {place.pid} on node {place.address})"
            message = f"{subject} has not answered for {now - answered_at[rank]:.0f} s"
            self._add_dead_rank(rank, FailureKind.SILENT, message)

    def release(self, released: dict[int, int]) -> None:
        """Lets ranks delete reports up to a number; a committed checkpoint has them."""
        for rank, n in released.items():
            self._views[rank].released = n

    def fail(self, kind: FailureKind, message: str, rank: int | None = None) -> None:
        """Adds a failure; `rank` is None for one that belongs to no rank."""
        self._fail(kind, message, rank)

    def _poll(self, view: RankView) -> None:
        rank = view.place.rank
        released = view.released
        stored = 0
        # Rank 0's reports are sent to the service too, and may only be deleted when
        # both the service and a checkpoint contain them.
        if rank == 0:
            stored = self._stored()
            released = min(released, stored)
        poll = Poll(
            view.cursor,
            released,
            _WAIT_S,
            steps=rank == 0,
            stored=stored,
            log_offset=view.log_offset,
            log_bytes=min(_LOG_BYTES, _TOTAL_LOG_BYTES // len(self._views)),
        )
        self._group.poll(view.place.slot, rank, self._plan.fence, poll)

    def _handle_reply(self, view: RankView, reply: NextReply) -> None:
        rank = view.place.rank
        view.cursor = reply.last_n
        self._logs.write(self._plan.attempt, rank, reply.log_offset, reply.log)
        view.log_offset = reply.log_offset + len(reply.log)
        if reply.reports > view.num_reports:
            view.num_reports = reply.reports
            view.pace = reply.pace
            self._progress = self._progress.advanced(
                view.answered_at, has_stepped=reply.step > 0
            )
        self._check_reply(view, reply)
        view.state = reply.state
        # A rank that has ended is polled until its whole log has been received.
        if not view.state.is_over or reply.log:
            self._poll(view)

    def _check_reply(self, view: RankView, reply: NextReply) -> None:
        rank = view.place.rank
        # A worker process that restarted unnoticed by the driver runs no attempt.
        if reply.attempt != self._plan.attempt:
            self._fail(FailureKind.START, "its worker does not run this attempt", rank)
        elif reply.state is RankState.FAILED and view.state is not RankState.FAILED:
            error = reply.error or {}
            kind, message = describe_error(error)
            detail = str(error.get("traceback", ""))
            failure = Failure(
                kind,
                message,
                rank,
                len(self.failures),
                detail,
                error.get("step"),
                error.get("facts", {}),
            )
            self.failures.append(failure)

    def _handle_death(self, view: RankView, answer: PollResult) -> None:
        death = answer.death or Death(FailureKind.PROCESS_DIED, "its process died")
        place = view.place
        where = f"pid {place.pid} on node {place.address}"
        if place.gpu is not None:
            where = f"{where}, GPU {place.gpu}"
        self._add_dead_rank(place.rank, death.kind, f"{death.message} ({where})")

    def _add_dead_rank(self, rank: int, kind: FailureKind, message: str) -> None:
        self.dead.add(rank)
        self._views[rank].state = RankState.FAILED
        self._fail(kind, message, rank)

    def _fail(
        self,
        kind: FailureKind,
        message: str,
        rank: int | None,
    ) -> None:
        self.failures.append(Failure(kind, message, rank, len(self.failures)))
