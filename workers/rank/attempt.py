"""Runs the training thread of one attempt on one rank.

Owns: the thread, its report spool, its inbox for commands.

The training thread never calls Ray: it writes to the spool and reads the inbox. Other
threads answer the driver's polls from the spool. Torch is imported in the training
thread, after output is redirected to the log, so this module must not import it. Must
not know: Ray, HTTP.
"""

import contextlib
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ray.commands import Command, ProfileRequest
from megatron_ray.distributed.activity import PROCESS
from megatron_ray.reports import (
    CheckpointFailedReport,
    CheckpointReport,
    EvalReport,
    MonitorReport,
    PeerCopiesRefusedReport,
    PhaseReport,
    ProfileReport,
    ReplicaGroupsReport,
    Report,
    RuleReport,
    SkippedStepReport,
    SpeedReport,
    StepReport,
)
from workers.decisions.preflight.figures import describe_speed
from workers.decisions.ranks.diagnosis import RankEvidence
from workers.decisions.ranks.stragglers import Pace
from workers.rank.environment import raise_priority
from workers.rank.evidence import gather_evidence
from workers.rank.log_file import LogFile
from workers.rank.messages import NextReply, Poll, RankState, StartRequest
from workers.rank.process_copies import ProcessCopies
from workers.rank.spool import Line, Spool, SpoolReader, report_path

LINGER_S = 0.5
"""Seconds that a reply with step reports waits for more of them, because one call per
step would cost more than a step of a small model."""
_TRACEBACK_CHARS = 16000
_URGENT = (
    CheckpointReport | CheckpointFailedReport | PhaseReport | ProfileReport | SpeedReport
)

Train = Callable[
    [
        StartRequest,
        Callable[[Report], None],
        Callable[[], Command],
        Callable[[], ProfileRequest | None],
    ],
    str,
]


def import_and_train(
    request: StartRequest,
    report: Callable[[Report], None],
    poll: Callable[[], Command],
    profiles: Callable[[], ProfileRequest | None],
    copies: ProcessCopies | None = None,
) -> str:
    """Runs the library's training session; imports torch."""
    from workers.rank.session import train

    return train(request, report, poll, profiles, copies)


class Inbox:
    """Holds one command from the driver for the training loop.

    A stop command is kept; a checkpoint request is returned once.
    """

    def __init__(self) -> None:
        self._command = Command.CONTINUE

    def put(self, command: Command) -> None:
        """Adds a command; the stronger of two wins."""
        self._command = max(self._command, command)

    def take(self) -> Command:
        """Returns the command for this step boundary; cheap enough for every step."""
        command = self._command
        if command is Command.CHECKPOINT:
            self._command = Command.CONTINUE
        return command


class RankAttempt:
    """The training thread of one attempt and its reports."""

    def __init__(self, request: StartRequest, train: Train, folder: Path) -> None:
        self.request = request
        self.inbox = Inbox()
        self.profile: ProfileRequest | None = None
        """The newest request of a profile on this rank."""
        self.state = RankState.RUNNING
        self.step = 0
        self.error: dict[str, Any] | None = None
        path = report_path(folder, request.attempt, request.env.rank)
        self.spool = Spool(path, request.attempt)
        self._first_n = self.spool.last_n
        self._reader = SpoolReader(path)
        self._read_lock = threading.Lock()
        self._has_report = threading.Event()
        # Set by reports that the driver should receive at once, without waiting for more.
        self._is_urgent = threading.Event()
        self._released = 0
        self._train = train
        self.thread = threading.Thread(
            target=self._run, name=f"attempt-{request.attempt}", daemon=True
        )

    def report(self, item: Report) -> None:
        """Appends a report to the spool: one write to a local file.

        Called in the training thread and in that of the checkpoint writer.
        """
        self.spool.append(item.kind, vars(item))
        # Only sets flags; the expensive part runs in the thread of the driver's call.
        if isinstance(item, StepReport):
            if not self.step:
                self._is_urgent.set()  # the job counts as running from its first step on
            self.step = item.step
        elif not isinstance(item, MonitorReport):
            self._log(_log_message(item))
        if isinstance(item, _URGENT):
            self._is_urgent.set()
        self._has_report.set()

    def next(self, poll: Poll, log: LogFile | None) -> NextReply:
        """Waits for reports and returns them; see `RankWorker.next`."""
        after = poll.after
        if after is None:
            after = self._released
        self._release(poll.released)
        self._wait_for_reports(after, poll.wait_s)
        with self._read_lock:
            # The state is read before the lines: once the attempt is over no line follows,
            # so all lines are included.
            state = self.state
            lines = self._reader.read(after)
        last_n = after
        if lines:
            last_n = lines[-1].n
        # The end is returned with the last report, a failure at once.
        if last_n < self.spool.last_n and state is not RankState.FAILED:
            state = RankState.RUNNING
        if not poll.steps:
            lines = _without_steps(lines)
        log_offset = poll.log_offset
        log_bytes = b""
        if log is not None:
            log_offset, log_bytes = log.read(poll.log_offset, poll.log_bytes)
        return NextReply(
            state=state,
            attempt=self.request.attempt,
            last_n=last_n,
            lines=lines,
            step=self.step,
            reports=self.spool.last_n - self._first_n,
            pace=self._pace(),
            error=self.error,
            log_offset=log_offset,
            log=log_bytes,
        )

    def evidence(self) -> RankEvidence:
        """Returns what the training thread does now, for a diagnosis."""
        return gather_evidence(
            self.request.env.rank, self.step, self.thread, has_ended=self.state.is_over
        )

    def _pace(self) -> Pace:
        # Before the first step the process's record may be that of an earlier attempt.
        if not self.step:
            return Pace()
        return Pace(PROCESS.steps, PROCESS.own_s, PROCESS.step_s)

    def _release(self, n: int) -> None:
        """Deletes the spool's files up to report `n`, which is stored elsewhere."""
        if n > self._released:
            self._released = n
            self.spool.release(n)

    def _wait_for_reports(self, after: int, wait_s: float) -> None:
        if after >= self.spool.last_n:
            self._has_report.wait(wait_s)
        if not self.state.is_over:
            self._is_urgent.wait(min(LINGER_S, wait_s))
        # Cleared before the lines are read: a report written in between sets the events
        # again, so that the next call returns at once.
        self._is_urgent.clear()
        self._has_report.clear()

    def _run(self) -> None:
        started = time.monotonic()
        raise_priority()
        env = self.request.env
        self._log(
            f"rank {env.rank} of {env.world_size}, attempt {self.request.attempt}, pid "
            f"{os.getpid()} on {socket.gethostname()}"
        )
        try:
            import workers.rank.session  # noqa: F401 - torch and the library: a phase of its own

            self.report(PhaseReport("import", time.monotonic() - started))
            outcome = self._train(
                self.request, self.report, self.inbox.take, lambda: self.profile
            )
            self.spool.append("ended", {"outcome": outcome, "step": self.step})
            self._log(f"{outcome} at step {self.step}")
            # The outcomes of the loop are also the states of a rank.
            self.state = RankState(outcome)
        except BaseException as error:  # noqa: BLE001 - the driver must learn whatever ends a rank
            text = "".join(traceback.format_exception(error))
            self.error = {
                "type": type(error).__name__,
                "message": str(error) or type(error).__name__,
                "failure_kind": str(getattr(error, "failure_kind", "")),
                "traceback": text[-_TRACEBACK_CHARS:],
            }
            self.error["step"] = self.step
            self.error["facts"] = dict(getattr(error, "facts", {}))
            with contextlib.suppress(OSError):
                self.spool.append("failed", self.error)
            os.write(2, text.encode(errors="replace"))
            # Set last, so that a driver that reads this state also gets the error and its
            # report.
            self.state = RankState.FAILED
        finally:
            self._is_urgent.set()
            self._has_report.set()

    def _log(self, message: str) -> None:
        """Writes a line to the rank's log; steps are in the spool only."""
        os.write(2, f"{time.strftime('%H:%M:%S')} {message}\n".encode())


def _without_steps(lines: list[Line]) -> list[Line]:
    kinds = (StepReport.kind, EvalReport.kind, MonitorReport.kind)
    return [line for line in lines if line.kind not in kinds]


def _log_message(item: Report) -> str:
    """Returns a report as a line of the log."""
    if isinstance(item, PhaseReport):
        return f"{item.phase} took {item.seconds:.2f} s"
    if isinstance(item, CheckpointReport):
        return (
            f"wrote {item.bytes_written} bytes of the checkpoint of step {item.step} in "
            f"{item.seconds:.2f} s: {item.path}"
        )
    if isinstance(item, CheckpointFailedReport):
        return f"did not write the checkpoint of step {item.step}: {item.cause}"
    if isinstance(item, EvalReport):
        return f"step {item.step}: {item.split} loss {item.loss:.4f} over {item.num_tokens} tokens"
    if isinstance(item, SkippedStepReport | RuleReport):
        return item.message
    if isinstance(item, ProfileReport | ReplicaGroupsReport):
        return item.sentence()
    if isinstance(item, PeerCopiesRefusedReport):
        return f"the copies of step {item.step} are not used: {item.cause}"
    if isinstance(item, SpeedReport):
        return describe_speed(vars(item))
    return f"step {item.step}: {item.kind}"
