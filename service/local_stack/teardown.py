"""The end of a local stack.

Owns: `down`. Works from stack.json alone, whoever died at whatever moment; may be
repeated.

Must not know: how the stack was started.
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

# `up` that is asked to end cancels the jobs and kills what it started; it gets this
# long before `down` does it instead.
_UP_GRACE_S = 60.0
_POLL_S = 0.2
_TERMINAL = frozenset(state.value for state in JobState if state.is_terminal)

Say = Callable[[str], None]


@dataclass(frozen=True)
class TeardownReport:
    """What `down` found and did."""

    was_up: bool
    ended_by_up: bool = False
    """`up` was alive and did it itself."""
    processes_killed: int = 0
    jobs_cancelled: tuple[str, ...] = ()
    jobs_interrupted: tuple[str, ...] = ()
    """Jobs that had not ended when their processes were killed; they go on from their
    last checkpoint at the next `up`."""


def down(data_dir: Path, say: Say, job_grace_s: float = 20.0) -> TeardownReport:
    """Ends the stack of this data dir.

    Raises RecordUnreadableError, and TimeoutError when processes survive SIGKILL.
    """
    record = read_record(data_dir)
    if record is None:
        return TeardownReport(was_up=False)
    if (
        record.may_be_alive
        and record.up_pid != os.getpid()
        and is_running(record.up_pid, record.up_start_ticks)
    ):
        say(f"asking `up` (pid {record.up_pid}) to end")
        if _end_supervisor(record):
            remaining = read_record(data_dir)
            if remaining is None or remaining.stack_id != record.stack_id:
                return TeardownReport(was_up=True, ended_by_up=True)
    return end_recorded(record, say, job_grace_s)


def end_recorded(
    record: StackRecord,
    say: Say,
    job_grace_s: float,
    hurry: Callable[[], bool] = lambda: False,
) -> TeardownReport:
    """Cancels the jobs, kills the sessions, removes the temp dir, forgets the record;
    in this order, so that it may be repeated.

    `hurry` is asked while jobs are ending; True stops waiting for them.
    """
    cancelled: tuple[str, ...] = ()
    interrupted: tuple[str, ...] = ()
    killed = 0
    sessions = [entry.session for entry in record.sessions]
    if record.may_be_alive and sessions:
        if record.phase == "ready" and job_grace_s > 0:
            cancelled, interrupted = _cancel_jobs(record, say, job_grace_s, hurry)
        killed = kill_sessions(sessions)
    remove_temp_dir(Path(record.temp_dir))
    forget(Path(record.data_dir))
    return TeardownReport(
        was_up=True,
        processes_killed=killed,
        jobs_cancelled=cancelled,
        jobs_interrupted=interrupted,
    )


def remove_temp_dir(path: Path) -> None:
    """Removes a stack's temp dir, and refuses anything that is not named like one."""
    if not path.name.startswith(TEMP_PREFIX):
        raise ValueError(
            f"{path} is not a temp dir of a local stack; remove stack.json by hand if it was edited"
        )
    shutil.rmtree(path, ignore_errors=True)


def _end_supervisor(record: StackRecord) -> bool:
    """True once `up` has ended by itself; else it is killed, so that it starts nothing
    again.
    """
    pid = record.up_pid
    start = record.up_start_ticks
    deadline = time.monotonic() + _UP_GRACE_S
    send_signal(pid, start, signal.SIGTERM)
    while is_running(pid, start) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    ended = not send_signal(pid, start, signal.SIGKILL)
    while is_running(pid, start):
        time.sleep(_POLL_S)
    return ended


def _cancel_jobs(
    record: StackRecord, say: Say, grace_s: float, hurry: Callable[[], bool]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(cancelled, still running after the grace).

    A service that does not answer has no say.
    """
    deadline = time.monotonic() + grace_s
    cancelled: list[str] = []
    try:
        with Client(record.url, record.token, timeout_s=5.0) as client:
            running = [
                job["id"]
                for job in client.jobs(limit=100)["data"]
                if job["status"] not in _TERMINAL
            ]
            for job_id in running:
                say(f"cancelling {job_id}")
                client.cancel(job_id)
            while running and time.monotonic() < deadline and not hurry():
                ended = [
                    job_id
                    for job_id in running
                    if client.show(job_id)["status"] in _TERMINAL
                ]
                cancelled += ended
                running = [job_id for job_id in running if job_id not in ended]
                time.sleep(_POLL_S if running else 0)
            return tuple(cancelled), tuple(running)
    except ServiceError as error:
        say(f"could not cancel jobs: {error}")
        return tuple(cancelled), ()
