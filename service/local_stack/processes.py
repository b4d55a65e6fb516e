"""Launches and kills the processes of a local stack and keeps their record.

Must not know: what the processes do, in which order they start.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from service.local_stack.backoff import Restart, after_end
from service.local_stack.files import StackFiles
from service.local_stack.interruption import Interruption, StartInterruptedError
from service.local_stack.record import ProcessName, StackRecord, write_record
from service.local_stack.sessions import GatedProcess, kill_sessions

LABELS: dict[ProcessName, str] = {
    "ray": "Ray",
    "service": "the service",
    "agent": "the agent",
}
_POLL_S = 0.1


@dataclass
class ChildProcess:
    """One supervised process. Times are those of `time.monotonic`."""

    gated: GatedProcess
    started_at: float
    crashes: int = 0
    """Consecutive exits before it counted as working."""
    ready_at: float | None = None
    restart_at: float | None = None
    """When to restart it; None before its exit was noticed."""

    def has_ended(self) -> bool:
        """Returns whether the process has exited."""
        return self.gated.process.poll() is not None

    def after_end(self, now: float) -> Restart:
        """Returns when to restart it, given that it has just exited."""
        ready_s = None
        if self.ready_at is not None:
            ready_s = now - self.ready_at
        return after_end(self.crashes, now - self.started_at, ready_s)


@dataclass
class StackProcesses:
    """The processes of one stack, each recorded before it runs."""

    record: StackRecord
    files: StackFiles
    interruption: Interruption
    children: dict[ProcessName, ChildProcess] = field(default_factory=dict)

    def update_record(self, **changes: object) -> None:
        """Changes fields of the record, on disk first."""
        self._save(self.record.model_copy(update=changes))

    def launch(
        self, name: ProcessName, command: list[str], environment: Mapping[str, str | None]
    ) -> None:
        """Starts a process.

        Raises StartInterruptedError after a signal.
        """
        self._check_interrupted()
        crashes = 0
        if name in self.children:
            crashes = self.children[name].crashes
        # Gated, recorded, released: in this order a kill at any moment leaves nothing
        # running that `down` does not know.
        gated = GatedProcess(command, log=self.files.log(name))
        try:
            self._save(self.record.with_session(name, gated.session))
        except OSError:
            gated.abandon()
            raise
        gated.release(environment)
        self.children[name] = ChildProcess(gated, time.monotonic(), crashes)

    def kill(self, name: ProcessName) -> None:
        """Kills a process with its whole session."""
        gated = self.children[name].gated
        kill_sessions([gated.session])
        gated.process.wait()

    def wait(self) -> None:
        """Reaps all processes, which have been killed."""
        for child in self.children.values():
            child.gated.process.wait()

    def sleep(self, seconds: float = _POLL_S) -> None:
        """Sleeps between two polls of a start.

        Raises StartInterruptedError after a signal.
        """
        self._check_interrupted()
        time.sleep(seconds)

    def _check_interrupted(self) -> None:
        if self.interruption.is_requested:
            raise StartInterruptedError

    def _save(self, record: StackRecord) -> None:
        write_record(record)
        self.record = record
