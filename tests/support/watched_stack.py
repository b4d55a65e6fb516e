"""A stack in a process group of its own; collects every session it ever recorded, so
that a test can find what is left running.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from service.local_stack.record import StackRecord, read_record
from service.local_stack.sessions import Session, members

SCRIPT = Path(__file__).parent / "fake_stack.py"


class Watched:
    """`up` in a process group of its own, and every session that it ever recorded."""

    def __init__(
        self, data_dir: Path, command: Sequence[str] = (sys.executable, str(SCRIPT))
    ) -> None:
        """`command` gets the data dir as its last argument; by default the stack with
        stand-ins for service and agent.
        """
        self.data_dir = data_dir
        self.seen: set[Session] = set()
        self.temp_dirs: set[Path] = set()
        # A shell's background job ignores SIGINT and so would its children; what is
        # handled here is at its default there.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = subprocess.Popen(
                [*command, str(data_dir)],
                process_group=0,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        finally:
            signal.signal(signal.SIGINT, before)

    def look(self) -> StackRecord | None:
        record = read_record(self.data_dir)
        if record is not None:
            self.seen.update(entry.session for entry in record.sessions)
            self.temp_dirs.add(Path(record.temp_dir))
        return record

    def watch_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            self.look()
            time.sleep(0.01)

    def wait_until_ready(self) -> StackRecord:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            record = self.look()
            if record is not None and record.phase == "ready":
                return record
            time.sleep(0.02)
        raise AssertionError("not ready")

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def assert_nothing_left(self) -> None:
        assert members(self.seen) == []
        assert [path for path in self.temp_dirs if path.exists()] == []
        assert read_record(self.data_dir) is None
        assert processes_that_name(str(self.data_dir)) == []
        for temp_dir in self.temp_dirs:
            assert processes_that_name(str(temp_dir)) == []


def processes_that_name(text: str) -> list[int]:
    """Pids whose command line or environment holds the text, this process and its
    parents aside.
    """
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in (os.getpid(), os.getppid()):
            continue
        for name in ("cmdline", "environ"):
            try:
                content = (entry / name).read_bytes()
            except OSError:
                continue
            if text.encode() in content:
                pids.append(int(entry.name))
    return pids
