"""Processes that are ended by a signal, and those that are left alone."""

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from workers.ray.processes import end_here


@pytest.fixture
def stopped() -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    """A stopped process by each title."""
    processes = {}
    for title in ("ray::RankWorker.next", "ray::JobDriver"):
        process = subprocess.Popen([title, "60"], executable="/bin/sleep")
        os.kill(process.pid, signal.SIGSTOP)
        processes[title] = process
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def test_a_stopped_worker_is_ended_and_no_other_process(
    stopped: dict[str, "subprocess.Popen[bytes]"],
) -> None:
    ended = subprocess.Popen(["/bin/true"])
    ended.wait()
    end_here([ended.pid, *(process.pid for process in stopped.values())])
    assert stopped["ray::RankWorker.next"].wait(10) == -signal.SIGKILL
    assert stopped["ray::JobDriver"].poll() is None
