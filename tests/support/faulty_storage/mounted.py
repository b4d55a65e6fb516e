"""A folder that fails on command, for tests.

Owns: the server's process, the switch, the unmount at the end. Must not know: how
operations are carried out.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.faulty_storage.faults import ALL, FULL, READS, WRITES, Fault
from tests.support.faulty_storage.server import DEVICE, unmount

_END_S = 10.0


def why_not() -> str | None:
    """Returns why this machine cannot mount such a folder; None if it can."""
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"{DEVICE} is missing or not accessible"
    if os.geteuid() != 0:
        return "only root may mount a file system that all processes see"
    return None


class FaultyStorage:
    """The mounted folder `path`; what is written there lies in `backing`."""

    def __init__(self, path: Path, backing: Path) -> None:
        self.path = path
        self.backing = backing
        for folder in (path, backing):
            folder.mkdir(parents=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.faulty_storage.server", backing, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=Path(__file__).parents[3],
        )
        self._await_ready()

    def turn_on(self, fault: Fault) -> None:
        """Switches a fault on, in place of the one before; returns once it is on."""
        assert self._process.stdin is not None
        self._process.stdin.write(fault.to_line())
        self._process.stdin.flush()
        self._await_ready()

    def _await_ready(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the server has ended"

    def fail_writes(self, seconds: float) -> None:
        """Writing fails with EIO."""
        self.turn_on(Fault(WRITES, seconds, "EIO"))

    def fail_reads(self, seconds: float) -> None:
        """Reading fails with EIO."""
        self.turn_on(Fault(READS, seconds, "EIO"))

    def fail(self, seconds: float) -> None:
        """Everything fails with EIO."""
        self.turn_on(Fault(ALL, seconds, "EIO"))

    def fill(self, seconds: float) -> None:
        """Writing fails with ENOSPC."""
        self.turn_on(Fault(FULL, seconds, "ENOSPC"))

    def stall(self, seconds: float) -> None:
        """Every operation waits."""
        self.turn_on(Fault(ALL, seconds))

    def heal(self) -> None:
        """Ends the fault."""
        self.turn_on(Fault((), 0.0))

    def close(self) -> None:
        """Unmounts."""
        # The server unmounts when its input ends, also when the test has died.
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self.heal()
            self._process.stdin.close()
            self._process.wait(_END_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            self._process.stdout.close()
            unmount(str(self.path))


@contextmanager
def faulty_storage(folder: Path) -> Iterator[FaultyStorage]:
    """A mounted folder, unmounted at the end."""
    storage = FaultyStorage(folder / "mounted", folder / "backing")
    try:
        yield storage
    finally:
        storage.close()
