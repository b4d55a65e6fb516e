"""One attempt while it runs.

Owns: the outstanding calls, the rank reports, commits, and the verdict when the attempt
is over.

Observes (answers of the ranks, the service's wish, the clock), decides (policies), acts
(commands, commits). It does not restart anything: it returns how the attempt ended.
Must not know: HTTP, torch, how workers are made.
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from megatron_ray.commands import Command
from megatron_ray.reports import CheckpointReport, EvalReport, PhaseReport, StepReport
from megatron_ray.storage.storage import StorageError
from workers.decisions import failures, liveness
from workers.decisions.failures import Failure, FailureKind
from workers.decisions.liveness import Progress
from workers.decisions.placement import RankPlace
from workers.driver.commit import CheckpointLedger, WholeCheckpoint, commit_whole, source_of
from workers.driver.logs import JobLogs
from workers.driver.outbox import Outbox
from workers.protocol.states import DesiredState
from workers.protocol.wire import DesiredJob
from workers.rank.messages import Fence, NextReply, Poll, RankState
from workers.rank.spool import Line
from workers.ray.worker_group import Answer, Death, WorkerGroup

SETTLE_S = 0.3
"""After the first failure the others are waited for so long: the cause may be among
them."""
_TICK_S = 0.2
_WAIT_S = 2.0
_LOG_BYTES = 64 << 10
_LOG_BYTES_ALL = 4 << 20


class EndKind(StrEnum):
    """How an attempt ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class AttemptEnd:
    """The verdict; `cause` for FAILED."""

    kind: EndKind
    cause: Failure | None = None
    dead_ranks: tuple[int, ...] = ()
    """Ranks whose process is gone or must go."""
    forced: bool = False
    """Stopped because the grace period ran out."""


@dataclass(frozen=True)
class AttemptPlan:
    """What an attempt was started with."""

    attempt: int
    epoch: int
    places: tuple[RankPlace, ...]
    storage_path: str
    keep_last: int
    grace_s: float
    manifest: dict[str, Any]
    last_commit: int
    checkpoint_requests: int = 0
    """Wishes for a checkpoint that the ranks have heard before."""
    stopping: DesiredState | None = None
    """Why they were told to stop before, by an earlier incarnation."""
    renew: bool = False
    """Stop at a checkpoint and end: this code is another version than the one that
    started the ranks."""


@dataclass
class RankView:
    """What is known of one rank."""

    place: RankPlace
    heard_at: float
    cursor: int | None
    released: int = 0
    state: RankState = RankState.RUNNING
    reports: int = 0
    log_offset: int = 0
    written_n: dict[int, int] = field(default_factory=dict)
    """Number of its report that it wrote a checkpoint, by step."""


class Listener(Protocol):
    """Who keeps the books of the attempt; called in the driver's thread."""

    def stepped(self, data: dict[str, Any]) -> None: ...

    def phase(self, data: dict[str, Any]) -> None: ...

    def committed(self, whole: WholeCheckpoint, deleted: Sequence[str]) -> None: ...

    def commanded(
        self,
        *,
        stopping: DesiredState | None = None,
        checkpoint_requests: int | None = None,
    ) -> None: ...


class Supervision:
    """Runs one attempt to its end."""

    def __init__(
        self,
        plan: AttemptPlan,
        group: WorkerGroup,
        outbox: Outbox,
        logs: JobLogs,
        listener: Listener,
    ) -> None:
        self._plan = plan
        self._group = group
        self._outbox = outbox
        self._logs = logs
        self._listener = listener
        now = time.monotonic()
        self.views = {
            place.rank: RankView(
                place, now, cursor=None, log_offset=logs.size(plan.attempt, place.rank)
            )
            for place in plan.places
        }
        self._fence = Fence(plan.attempt, plan.epoch)
        self._ledger = CheckpointLedger(len(plan.places), plan.attempt)
        self._progress = Progress(now)
        self._failures: list[Failure] = []
        self._dead: set[int] = set()
        self._step_n: dict[int, int] = {}
        self._stepped = False
        self._deadline: float | None = None
        self._checkpoint_requests = plan.checkpoint_requests
        self._committer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._committing: Future[Sequence[str]] | None = None
        self._commit_of: WholeCheckpoint | None = None

    def run(self) -> AttemptEnd:
        """Returns the verdict. Raises Fenced when a newer driver is at work."""
        for rank in self.views:
            self._ask(rank)
        try:
            while True:
                end = self._turn()
                if end is not None:
                    return end
        finally:
            self._group.drop_calls()
            self._committer.shutdown(wait=False)

    def _turn(self) -> AttemptEnd | None:
        for answer in self._group.collect(_TICK_S):
            self._take(answer)
        self._look_at_clock()
        self._commit()
        if self._failures:
            return self._settle()
        self._obey(self._outbox.desired)
        if self._deadline is not None and time.monotonic() > self._deadline:
            return AttemptEnd(EndKind.STOPPED, dead_ranks=tuple(self.views), forced=True)
        if all(view.state.is_over for view in self.views.values()):
            self._finish_commits()
            finished = all(view.state is RankState.FINISHED for view in self.views.values())
            return AttemptEnd(EndKind.FINISHED if finished else EndKind.STOPPED)
        return None

    # ---- observing

    def _ask(self, rank: int) -> None:
        view = self.views[rank]
        released = view.released
        if rank == 0:
            released = min(released, self._outbox.stored(self.source))
        budget = min(_LOG_BYTES, _LOG_BYTES_ALL // len(self.views))
        poll = Poll(
            view.cursor,
            released,
            _WAIT_S,
            steps=rank == 0,
            log_offset=view.log_offset,
            log_bytes=budget,
        )
        self._group.poll(view.place.slot, rank, self._fence, poll)

    @property
    def source(self) -> str:
        """Name of rank 0's records."""
        return source_of(self._plan.attempt)

    def _take(self, answer: Answer) -> None:
        view = self.views[answer.rank]
        view.heard_at = time.monotonic()
        if answer.reply is None:
            self._died(
                answer.rank,
                answer.death or Death(FailureKind.PROCESS_DIED, "its process died"),
            )
            return
        reply = answer.reply
        self._take_lines(view, reply.lines)
        view.cursor = reply.last_n
        self._logs.write(self._plan.attempt, answer.rank, reply.log_offset, reply.log)
        view.log_offset = reply.log_offset + len(reply.log)
        if reply.reports > view.reports:
            view.reports = reply.reports
            self._progress = self._progress.advanced(view.heard_at)
        view.state = self._state_of(view, reply)
        if not view.state.is_over or reply.log:
            self._ask(answer.rank)

    def _state_of(self, view: RankView, reply: NextReply) -> RankState:
        if reply.attempt != self._plan.attempt:
            self._fail(
                FailureKind.START, "its worker does not run this attempt", view.place.rank
            )
        elif reply.state is RankState.FAILED and view.state is not RankState.FAILED:
            kind, message = failures.describe_error(reply.error or {})
            self._fail(
                kind,
                message,
                view.place.rank,
                str((reply.error or {}).get("traceback", "")),
            )
        return reply.state

    def _take_lines(self, view: RankView, lines: list[Line]) -> None:
        for line in lines:
            if line.kind != CheckpointReport.kind:
                continue
            data = line.value()["data"]
            if data["step"] > self._plan.last_commit:
                view.written_n[data["step"]] = line.n
                self._ledger.written(
                    view.place.rank, data["step"], data["path"], data["bytes_written"]
                )
        if view.place.rank == 0 and lines:
            told = [relayed(line) for line in lines]
            self._read_along(told)
            self._outbox.relay(self.source, told)

    def _read_along(self, told: list[Line]) -> None:
        """What rank 0 says goes into the next checkpoint too."""
        for record in (line.value() for line in told):
            data = record["data"]
            self._ledger.reported(record)
            if record["kind"] == StepReport.kind:
                if data["step"] > self._plan.last_commit:
                    self._take_step(record["n"], data)
            elif data.get("type") == f"rank.{PhaseReport.kind}":
                self._listener.phase(data["data"])

    def _take_step(self, n: int, data: dict[str, Any]) -> None:
        self._step_n[data["step"]] = n
        self._stepped = True
        self._listener.stepped(data)

    def _died(self, rank: int, death: Death) -> None:
        place = self.views[rank].place
        where = f"pid {place.pid} on node {place.address}" + (
            "" if place.gpu is None else f", GPU {place.gpu}"
        )
        self._dead.add(rank)
        self.views[rank].state = RankState.FAILED
        self._fail(death.kind, f"{death.words} ({where})", rank)

    def _fail(
        self, kind: FailureKind, message: str, rank: int | None, detail: str = ""
    ) -> None:
        self._failures.append(Failure(kind, message, rank, len(self._failures), detail))

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        limit = liveness.SILENCE_S if self._stepped else liveness.START_SILENCE_S
        waiting = {
            rank: view.heard_at
            for rank, view in self.views.items()
            if not view.state.is_over
        }
        for rank in liveness.silent_ranks(now, waiting, limit):
            self._dead.add(rank)
            self.views[rank].state = RankState.FAILED
            self._fail(
                FailureKind.SILENT,
                f"node {self.views[rank].place.address} has not answered for {limit:.0f} s",
                rank,
            )
        sentence = liveness.hang(now, self._progress) if waiting else None
        if sentence:
            self._fail(FailureKind.HANG, sentence, None)

    # ---- acting

    def _obey(self, desired: DesiredJob | None) -> None:
        wish = desired.desired if desired is not None else self._plan.stopping
        unwanted = wish in (DesiredState.CANCEL, DesiredState.PAUSE)
        if (unwanted or self._plan.renew) and self._deadline is None:
            save = desired is None or desired.final_checkpoint or not unwanted
            if unwanted and wish is not self._plan.stopping:
                self._listener.commanded(stopping=wish)
            self._command(Command.CHECKPOINT_AND_STOP if save else Command.STOP)
            self._deadline = time.monotonic() + self._plan.grace_s
        elif (
            desired is not None and desired.checkpoint_requests > self._checkpoint_requests
        ):
            self._command(Command.CHECKPOINT)
            self._checkpoint_requests = desired.checkpoint_requests
            self._listener.commanded(checkpoint_requests=self._checkpoint_requests)

    def _command(self, command: Command) -> None:
        """To rank 0 alone: the ranks agree on the largest command in the step's own
        reduction.
        """
        self._group.command(self.views[0].place.slot, self._fence, command)

    def _commit(self) -> None:
        """One commit at a time, off this thread: storage may be slow, and ranks must
        still be heard.
        """
        if self._committing is not None:
            if not self._committing.done():
                return
            self._take_commit()
        whole = self._ledger.take_whole(self._outbox.stored(self.source))
        if whole is not None:
            self._commit_of = whole
            plan = self._plan
            self._committing = self._committer.submit(
                commit_whole, whole, plan.storage_path, plan.keep_last, plan.manifest
            )

    def _take_commit(self) -> None:
        assert self._committing is not None
        assert self._commit_of is not None
        whole = self._commit_of
        future = self._committing
        self._commit_of = self._committing = None
        try:
            deleted = future.result()
        except StorageError as error:
            self._fail(
                FailureKind.STORAGE,
                f"the checkpoint of step {whole.step} cannot be committed: {error}",
                None,
            )
            return
        self._release(whole.step)
        self._listener.committed(whole, deleted)

    def _release(self, step: int) -> None:
        """Reports up to a commit are in the checkpoint; what the service has stored too
        may go from the ranks' files.
        """
        for view in self.views.values():
            if step in view.written_n:
                view.released = view.written_n.pop(step)
        lines = [n for at, n in self._step_n.items() if at <= step]
        self._step_n = {at: n for at, n in self._step_n.items() if at > step}
        if lines:
            self.views[0].released = min(self.views[0].released, max(lines))

    def _finish_commits(self) -> None:
        """At the end of an attempt every whole checkpoint is committed before anything
        else happens.
        """
        while True:
            self._commit()
            if self._committing is None:
                return
            self._committing.exception()

    def _settle(self) -> AttemptEnd:
        """The first error is seldom alone: waits shortly for others, so that the cause
        is found, not its echo.
        """
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline and not all(
            view.state.is_over for view in self.views.values()
        ):
            for answer in self._group.collect(0.05):
                self._take(answer)
        self._finish_commits()
        cause = failures.root_cause(self._failures)
        if cause.kind is FailureKind.HANG:
            self._dead.update(self.views)
        return AttemptEnd(EndKind.FAILED, cause, tuple(sorted(self._dead)))


def relayed(line: Line) -> Line:
    """A rank's report as a record the service knows: steps and evaluations as they are,
    the rest as events of the same number.
    """
    if line.kind in (StepReport.kind, EvalReport.kind):
        return line
    record = json.loads(line.text)
    data = record["data"]
    level = "info"
    message = ""
    if line.kind == PhaseReport.kind:
        message = f"{data['phase']} took {data['seconds']:.2f} s"
    elif line.kind == CheckpointReport.kind:
        message = (
            f"wrote {data['bytes_written']} bytes of the checkpoint of step {data['step']} in "
            f"{data['seconds']:.2f} s"
        )
    elif line.kind == "failed":
        kind, words = failures.describe_error(data)
        # Of a rank that only lost another one; whoever reads warnings alone is to find
        # the cause first.
        echo = kind is FailureKind.COLLATERAL
        level, message = (
            ("info", f"rank 0 lost a rank it was working with: {words}")
            if echo
            else ("warn", f"rank 0: {words}")
        )
    elif line.kind == "ended":
        message = f"{data['outcome']} at step {data['step']}"
    record |= {
        "kind": "event",
        "data": {
            "type": f"rank.{line.kind}",
            "level": level,
            "message": message,
            "data": data,
            "ranks": [0],
        },
    }
    return Line(line.n, "event", json.dumps(record).encode())
