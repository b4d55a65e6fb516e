"""Runs `up` as a background process, for `up --detach`."""

import sys
import time
from pathlib import Path

from service.cli.connection import local_stack
from service.cli.failure import CommandError
from service.local_stack.files import private_folder
from service.local_stack.interruption import Interruption
from service.local_stack.record import StackRecord
from service.local_stack.sessions import GatedProcess, is_running, send_signal

_POLL_S = 0.1
# 128 + SIGINT, as shells report it.
_INTERRUPTED = 130


def up_detached(
    folder: Path, cpus: int | None, ready_timeout_s: float, interruption: Interruption
) -> StackRecord:
    """Starts `up` in a session of its own and returns its record once it is ready.

    Raises CommandError when it exits before or a signal arrives.
    """
    log = folder / "logs" / "up.log"
    try:
        # Both before anything is written to them: `up` itself comes later.
        private_folder(folder)
        private_folder(log.parent)
        # The log is appended to; output after this offset belongs to this start.
        log_start = 0
        if log.exists():
            log_start = log.stat().st_size
        child = GatedProcess(_up_command(folder, cpus, ready_timeout_s), log=log)
    except OSError as error:
        raise CommandError(
            f"cannot write to the data dir {folder}: {error.strerror}",
            remedy="choose another with --data-dir",
        ) from error
    # `up` records itself before it starts anything, so this process need not.
    child.release({})
    while True:
        if child.process.poll() is not None:
            raise _failed_start(child, log, log_start)
        if interruption.is_requested:
            _interrupt(child, interruption)
            raise CommandError(
                "interrupted while starting; all processes were stopped",
                exit_code=_INTERRUPTED,
            )
        record = local_stack(folder)
        # The record may belong to a previous stack.
        if record is not None and record.up_pid == child.session.sid:
            if record.phase == "ready":
                return record
        time.sleep(_POLL_S)


def _up_command(folder: Path, cpus: int | None, ready_timeout_s: float) -> list[str]:
    # The log is plain text, so `up` runs without --json.
    command = [
        sys.executable,
        "-m",
        "service.cli.entry",
        "up",
        "--data-dir",
        str(folder),
        "--ready-timeout-s",
        str(ready_timeout_s),
    ]
    if cpus is not None:
        command += ["--cpus", str(cpus)]
    return command


def _failed_start(child: GatedProcess, log: Path, log_start: int) -> CommandError:
    """Returns the error that `up` printed to its log."""
    with log.open("rb") as file:
        file.seek(log_start)
        message = file.read().decode(errors="replace").strip()
    # Messages of the teardown may precede the error.
    _, marker, error = message.partition("error: ")
    if marker:
        message = error
    return CommandError(
        message or "`up` exited during startup", exit_code=child.process.returncode or 1
    )


def _interrupt(child: GatedProcess, interruption: Interruption) -> None:
    """Passes the signal on and waits until `up` has ended what it started."""
    leader = child.session
    send_signal(leader.sid, leader.start_ticks, interruption.signal)
    while is_running(leader.sid, leader.start_ticks):
        time.sleep(_POLL_S)
        child.process.poll()
