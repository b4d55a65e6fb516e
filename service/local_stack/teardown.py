"""Stops a local stack.

Works from stack.json alone, whatever died at whatever moment, and may be repeated. Must
not know: how the stack was started.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.client import Client, ServiceError
from service.local_stack.record import TEMP_PREFIX, StackRecord, forget, read_record
from service.local_stack.sessions import is_running, kill_sessions, send_signal
from workers.protocol.states import JobState

# After SIGTERM, `up` cancels the jobs and kills what it started; it gets this long
# before `down` does both itself.
_UP_GRACE_S = 60.0
_POLL_S = 0.2
_TERMINAL = frozenset(state.value for state in JobState if state.is_terminal)

Report = Callable[[str], None]
"""Receives one message for the user."""


@dataclass(frozen=True)
class TeardownReport:
    """The outcome of a teardown."""

    was_up: bool
    ended_by_up: bool = False
    """Whether `up` was alive and did the teardown itself."""
    processes_killed: int = 0
    jobs_cancelled: tuple[str, ...] = ()
    jobs_interrupted: tuple[str, ...] = ()
    """Jobs whose processes were killed before they ended; the next `up` resumes them
    from their last checkpoint."""


def down(data_dir: Path, report: Report, job_grace_s: float = 20.0) -> TeardownReport:
    """Stops the stack of this data dir.

    Raises RecordUnreadableError, and TimeoutError when processes survive SIGKILL.
    """
    record = read_record(data_dir)
    if record is None:
        return TeardownReport(was_up=False)
    if _has_other_supervisor(record):
        report(f"stopping the stack (pid {record.up_pid})")
        if _end_supervisor(record):
            # `up` removes its record as the last step; one that is still there shows
            # that it exited half way.
            remaining = read_record(data_dir)
            if remaining is None or remaining.stack_id != record.stack_id:
                return TeardownReport(was_up=True, ended_by_up=True)
    return end_recorded(record, report, job_grace_s)


def end_recorded(
    record: StackRecord,
    report: Report,
    job_grace_s: float,
    is_urgent: Callable[[], bool] = lambda: False,
) -> TeardownReport:
    """Cancels the jobs, kills the sessions, removes the temp dir and the record.

    `is_urgent` is polled while jobs are ending; True stops waiting for them.
    """
    cancelled: tuple[str, ...] = ()
    interrupted: tuple[str, ...] = ()
    killed = 0
    sessions = [entry.session for entry in record.sessions]
    # Pids of another boot or container belong to unrelated processes.
    if record.may_be_alive and sessions:
        if record.phase == "ready" and job_grace_s > 0:
            cancelled, interrupted = _cancel_jobs(record, report, job_grace_s, is_urgent)
        killed = kill_sessions(sessions)
    # The record goes last: until then, an interrupted teardown can be repeated.
    remove_temp_dir(Path(record.temp_dir))
    forget(Path(record.data_dir))
    return TeardownReport(
        was_up=True,
        processes_killed=killed,
        jobs_cancelled=cancelled,
        jobs_interrupted=interrupted,
    )


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
    send_signal(pid, start_ticks, signal.SIGTERM)
    while is_running(pid, start_ticks) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    # A supervisor that lived on would restart what is about to be killed.
    has_exited = not send_signal(pid, start_ticks, signal.SIGKILL)
    while is_running(pid, start_ticks):
        time.sleep(_POLL_S)
    return has_exited


def _cancel_jobs(
    record: StackRecord, report: Report, grace_s: float, is_urgent: Callable[[], bool]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns (jobs that ended, jobs still running after the grace period)."""
    deadline = time.monotonic() + grace_s
    ended: list[str] = []
    try:
        with Client(record.url, record.token, timeout_s=5.0) as client:
            running = _unfinished_jobs(client)
            for job_id in running:
                report(f"cancelling {job_id}")
                client.cancel(job_id)
            while running and time.monotonic() < deadline and not is_urgent():
                for job_id in list(running):
                    if client.show(job_id)["status"] in _TERMINAL:
                        ended.append(job_id)
                        running.remove(job_id)
                if running:
                    time.sleep(_POLL_S)
            return tuple(ended), tuple(running)
    except ServiceError as error:
        # A service that does not answer must not keep its stack alive.
        report(f"could not cancel jobs: {error}")
        return tuple(ended), ()


def _unfinished_jobs(client: Client) -> list[str]:
    job_ids: list[str] = []
    for job in client.jobs(limit=100)["data"]:
        if job["status"] not in _TERMINAL:
            job_ids.append(job["id"])
    return job_ids
