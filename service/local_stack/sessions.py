"""Starts commands in process sessions of their own, and finds and kills sessions.

Linux only. Every process that Ray forks keeps the session id of `ray start`, whereas
process groups and environments change on the way. So sessions are what is recorded and
killed. Must not know: what the commands are for.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The gate reads NAME=VALUE lines (-NAME removes a variable) and runs the command once
# it reads `go`. When its parent dies before that, it reads the end of the pipe and
# exits. So no command runs before its parent has recorded it, and secrets travel by
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
    """State letter; `Z` is a zombie, which has exited but was not reaped."""
    start_ticks: int
    """Clock ticks from boot to the start; identifies the process together with its pid."""


@dataclass(frozen=True)
class Session:
    """A process session, identified by its leader."""

    sid: int
    start_ticks: int


class GatedProcess:
    """A command in its own session that does not run before `release`."""

    def __init__(self, argv: Sequence[str], *, log: Path, cwd: Path | None = None) -> None:
        # Private, whatever the umask: logs hold paths and addresses.
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "ab") as output:
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
            raise OSError(f"cannot read /proc/{self.process.pid}/stat of a new process")
        self.session = Session(leader.pid, leader.start_ticks)

    def release(self, environment: Mapping[str, str | None]) -> None:
        """Runs the command with `environment` added to the inherited variables.

        None removes a variable. Raises ValueError when a value spans several lines.
        """
        lines: list[str] = []
        for name, value in environment.items():
            line = f"{name}={value}"
            if value is None:
                line = f"-{name}"
            # A line break would let a value smuggle commands to the gate.
            if "\n" in line:
                raise ValueError(f"environment variable {name} spans several lines")
            lines.append(line)
        lines.append("go\n")
        gate = self.process.stdin
        assert gate is not None
        try:
            gate.write("\n".join(lines).encode())
            gate.close()
        except BrokenPipeError:
            pass  # killed at the gate; the caller sees it when it polls the process

    def abandon(self) -> None:
        """Closes the gate: the command never runs."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def read_process(pid: int) -> Process | None:
    """Returns a pid's entry of /proc, or None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name comes in parentheses and may itself hold spaces and `)`.
    fields = stat[stat.rindex(")") + 2 :].split()
    return Process(
        pid=pid, state=fields[0], session=int(fields[3]), start_ticks=int(fields[19])
    )


def is_running(pid: int, start_ticks: int) -> bool:
    """Returns whether this very process runs, not a later one with the same pid."""
    process = read_process(pid)
    if process is None:
        return False
    return process.start_ticks == start_ticks and process.state != "Z"


def members(sessions: Iterable[Session]) -> list[Process]:
    """Returns all processes of these sessions, zombies included.

    A session whose id was reused by an unrelated process has no members.
    """
    # The kernel does not reuse an id while one process of the session lives. A leader
    # with another start time therefore means that the whole session is gone, and so
    # does a member older than the leader.
    start_ticks: dict[int, int] = {}
    for session in sessions:
        if not _is_reused(session):
            start_ticks[session.sid] = session.start_ticks
    processes: list[Process] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        process = read_process(int(entry.name))
        if process is None or process.session not in start_ticks:
            continue
        if process.start_ticks >= start_ticks[process.session]:
            processes.append(process)
    return processes


def send_signal(pid: int, start_ticks: int, number: signal.Signals) -> bool:
    """Signals exactly this process; returns False when it is gone."""
    # The handle is opened before the check, so a recycled pid is never hit.
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
    """Sends SIGKILL until no process of the sessions runs; returns how many it killed.

    Raises TimeoutError with the pids of processes that survive.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + timeout_s
    # Repeated until nothing is left: a process may fork while its parent is killed.
    while True:
        alive = [process for process in members(sessions) if process.state != "Z"]
        if not alive:
            break
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in alive)
            raise TimeoutError(f"processes still running after SIGKILL: {pids}")
        for process in alive:
            if send_signal(process.pid, process.start_ticks, signal.SIGKILL):
                killed.add(process.pid)
        time.sleep(0.02)
    _wait_for_reaping(sessions)
    return len(killed)


def _wait_for_reaping(sessions: Sequence[Session]) -> None:
    # Process 1 reaps orphans, on some systems only every second or so, and on some
    # never; hence the deadline.
    deadline = time.monotonic() + _ZOMBIE_WAIT_S
    while members(sessions) and time.monotonic() < deadline:
        for session in sessions:
            _reap(session.sid)
        time.sleep(0.05)


def _reap(pid: int) -> None:
    # Not a child of this process, or reaped already.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _is_reused(session: Session) -> bool:
    leader = read_process(session.sid)
    return leader is not None and leader.start_ticks != session.start_ticks
