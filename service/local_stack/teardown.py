"""Stops a local stack.

Works from stack.json alone, whatever died at whatever moment, and may be repeated. Must
not know: how the stack was started.
"""

import os
import shutil
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from service.local_stack.job_stops import Report, StopJobs, StoppedJobs, stop_jobs
from service.local_stack.record import TEMP_PREFIX, StackRecord, forget, read_record
from service.local_stack.sessions import is_running, kill_sessions, send_signal

# After the signals, `up` kills what it started; it gets this long before `down` does so.
_UP_GRACE_S = 60.0
_POLL_S = 0.2


@dataclass(frozen=True)
class TeardownReport:
    """The outcome of a teardown."""

    was_up: bool
    ended_by_up: bool = False
    """Whether `up` was alive and did the teardown itself."""
    processes_killed: int = 0
    jobs: StoppedJobs = field(default_factory=StoppedJobs)


def down(
    data_dir: Path,
    report: Report,
    job_grace_s: float = 20.0,
    stop: StopJobs = StopJobs.PAUSE,
) -> TeardownReport:
    """Stops the stack of this data dir.

    Raises RecordUnreadableError, and TimeoutError when processes survive SIGKILL.
    """
    record = read_record(data_dir)
    if record is None:
        return TeardownReport(was_up=False)
    # Before `up` is asked to end, because it has a grace period of its own and would pause
    # the jobs that are to be cancelled.
    jobs = StoppedJobs()
    if record.may_be_alive and record.phase == "ready":
        jobs = stop_jobs(record, report, job_grace_s, stop)
    if _has_other_supervisor(record):
        report(f"stopping the stack (pid {record.up_pid})")
        if _end_supervisor(record):
            # `up` removes its record as the last step; one that is still there shows
            # that it exited half way.
            remaining = read_record(data_dir)
            if remaining is None or remaining.stack_id != record.stack_id:
                return TeardownReport(was_up=True, ended_by_up=True, jobs=jobs)
    return replace(end_recorded(record), jobs=jobs)


def end_recorded(record: StackRecord) -> TeardownReport:
    """Kills the sessions, removes the temp dir and the record.

    Jobs that run are interrupted, and continue from their last checkpoint.
    """
    killed = 0
    sessions = [entry.session for entry in record.sessions]
    # Pids of another boot or container belong to unrelated processes.
    if record.may_be_alive and sessions:
        killed = kill_sessions(sessions)
    # The record goes last: until then, an interrupted teardown can be repeated.
    remove_temp_dir(Path(record.temp_dir))
    forget(Path(record.data_dir))
    return TeardownReport(was_up=True, processes_killed=killed)


def remove_temp_dir(path: Path) -> None:
    """Removes a stack's temp dir.

    Raises ValueError when the folder is not named like one.
    """
    if not path.name.startswith(TEMP_PREFIX):
        raise ValueError(
            f"{path} is not a temp dir of a local stack; if stack.json was edited, "
            "remove it by hand"
        )
    shutil.rmtree(path, ignore_errors=True)


def _has_other_supervisor(record: StackRecord) -> bool:
    if not record.may_be_alive or record.up_pid == os.getpid():
        return False
    return is_running(record.up_pid, record.up_start_ticks)


def _end_supervisor(record: StackRecord) -> bool:
    """Returns True when `up` exits after SIGTERM, False when it had to be killed."""
    pid = record.up_pid
    start_ticks = record.up_start_ticks
    deadline = time.monotonic() + _UP_GRACE_S
    # The second signal ends `up` without a grace period: the jobs are stopped already. Two
    # kinds, because a pending signal is not queued twice.
    send_signal(pid, start_ticks, signal.SIGTERM)
    send_signal(pid, start_ticks, signal.SIGINT)
    while is_running(pid, start_ticks) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    # A supervisor that lived on would restart what is about to be killed.
    has_exited = not send_signal(pid, start_ticks, signal.SIGKILL)
    while is_running(pid, start_ticks):
        time.sleep(_POLL_S)
    return has_exited
