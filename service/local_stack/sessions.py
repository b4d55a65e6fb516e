"""Process sessions.

Owns: starting a command in a session of its own, finding and killing all that lives in
it. Linux only.

Every process that Ray forks keeps the session id of `ray start`, whereas process groups
and environments change on the way. So a session is what is recorded and what is killed.
Must not know: what the commands are for.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The gate: reads NAME=VALUE lines (-NAME takes one away) and runs the command once it
# reads `go`. When its parent dies before that, it reads the end of the pipe and exits.
# So no command ever runs that its parent has not recorded first, and secrets travel by
# pipe, neither in an argument list nor in this process's own environment.
_GATE = """while IFS= read -r line; do case "$line" in
go) exec "$@" </dev/null ;;
-*) unset "${line#-}" ;;
*) export "$line" ;;
esac; done; exit 1"""

_ZOMBIE_WAIT_S = 5.0


@dataclass(frozen=True)
class Process:
    """One entry of /proc."""

    pid: int
    session: int
    state: str
    """`Z` for a process that has ended and waits to be reaped."""
    start_ticks: int
    """Clock ticks from boot to its start: with the pid, its identity."""


@dataclass(frozen=True)
class Session:
    """A session by the identity of its leader."""

    sid: int
    start_ticks: int


class GatedProcess:
    """A command that waits at the gate, in a session of its own, until `release`."""

    def __init__(self, argv: Sequence[str], *, log: Path, cwd: Path | None = None) -> None:
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", _GATE, argv[0], *argv],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                start_new_session=True,
                bufsize=0,
            )
        leader = read_process(self.process.pid)
        if leader is None:
            raise OSError(
                f"could not read /proc/{self.process.pid}/stat of a process just started"
            )
        self.session = Session(leader.pid, leader.start_ticks)

    def release(self, environment: Mapping[str, str | None]) -> None:
        """Adds to the inherited environment (None takes away) and runs the command.

        Values must be single lines.
        """
        lines = [
            f"-{name}" if value is None else f"{name}={value}"
            for name, value in environment.items()
        ]
        if any("\n" in line for line in lines):
            raise ValueError("an environment value spans several lines")
        gate = self.process.stdin
        assert gate is not None
        try:
            gate.write(("\n".join([*lines, "go"]) + "\n").encode())
            gate.close()
        except BrokenPipeError:
            pass  # killed at the gate; whoever polls the process sees that

    def abandon(self) -> None:
        """Closes the gate for good: the command never runs."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def read_process(pid: int) -> Process | None:
    """What /proc says of a pid; None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return Process(
        pid=pid, state=fields[0], session=int(fields[3]), start_ticks=int(fields[19])
    )


def is_running(pid: int, start_ticks: int) -> bool:
    """Whether this very process, not a later one of the same number, still runs."""
    process = read_process(pid)
    return (
        process is not None and process.start_ticks == start_ticks and process.state != "Z"
    )


def members(sessions: Iterable[Session]) -> list[Process]:
    """All processes of these sessions, zombies included; none of a session whose number
    was given to somebody else.
    """
    # A number cannot be given away while one process of the session lives. A leader
    # with another start time therefore means that all of the session is gone, and so
    # does a member older than the leader.
    starts = {
        session.sid: session.start_ticks for session in sessions if not _taken_over(session)
    }
    numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    found = (process for process in map(read_process, numbers) if process is not None)
    return [
        process
        for process in found
        if process.session in starts and process.start_ticks >= starts[process.session]
    ]


def send_signal(pid: int, start_ticks: int, number: signal.Signals) -> bool:
    """Signals exactly this process; False when it is gone.

    The handle is opened before the check, so no recycled pid is hit.
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if not is_running(pid, start_ticks):
            return False
        signal.pidfd_send_signal(handle, number)
        return True
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(handle)


def kill_sessions(sessions: Sequence[Session], timeout_s: float = 20.0) -> int:
    """SIGKILLs every member until none is left; how many were killed.

    Raises TimeoutError with the pids that would not go.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + timeout_s
    while True:
        alive = [process for process in members(sessions) if process.state != "Z"]
        if not alive:
            break
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"processes that do not end: {', '.join(str(process.pid) for process in alive)}"
            )
        killed.update(
            process.pid
            for process in alive
            if send_signal(process.pid, process.start_ticks, signal.SIGKILL)
        )
        time.sleep(0.02)
    _wait_for_reaping(sessions)
    return len(killed)


def _wait_for_reaping(sessions: Sequence[Session]) -> None:
    # Orphans are reaped by process 1, on some systems only every second or so; one that
    # never does is no reason to wait for ever.
    deadline = time.monotonic() + _ZOMBIE_WAIT_S
    while members(sessions) and time.monotonic() < deadline:
        for session in sessions:
            _reap(session.sid)
        time.sleep(0.05)


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass  # not our child, or reaped already


def _taken_over(session: Session) -> bool:
    leader = read_process(session.sid)
    return leader is not None and leader.start_ticks != session.start_ticks
