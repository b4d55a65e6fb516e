"""A further node of a Ray cluster on this machine: it ends as a pod does, or falls silent."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from service.local_stack.sessions import (
    Session,
    kill_sessions,
    members,
    read_process,
    send_signal,
)

DRAIN_S = 20
"""Seconds for which Ray drains the node after SIGTERM."""


class JoinedNode:
    """One `ray start --block`, in a session of its own."""

    def __init__(
        self, address: str, num_cpus: int, environment: Mapping[str, str | None]
    ) -> None:
        variables = {**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S)}
        # A busy machine takes longer than the 30 s that Ray waits by default.
        variables["RAY_raylet_start_wait_time_s"] = "120"
        for name, value in environment.items():
            variables.pop(name, None)
            if value is not None:
                variables[name] = value
        host = address.partition(":")[0]
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
            *(f"--address={address}", f"--node-ip-address={host}"),
            *(f"--num-cpus={num_cpus}", "--object-store-memory=80000000"),
        ]
        self._process = subprocess.Popen(
            command,
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        leader = read_process(self._process.pid)
        assert leader is not None
        self._session = Session(leader.pid, leader.start_ticks)

    def has(self, pid: int) -> bool:
        """Whether a process runs on this node."""
        return pid in [process.pid for process in members([self._session])]

    def terminate(self) -> None:
        """Sends SIGTERM to `ray start`, as the kubelet does to a container's process 1."""
        self._process.terminate()

    def await_end(self, timeout_s: float) -> None:
        """Waits until Ray has left by itself."""
        self._process.wait(timeout_s)

    def freeze(self) -> None:
        """Stops every process of the node."""
        for process in members([self._session]):
            send_signal(process.pid, process.start_ticks, signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets a frozen node go on."""
        for process in members([self._session]):
            send_signal(process.pid, process.start_ticks, signal.SIGCONT)

    @property
    def session(self) -> Session:
        """The session that all of its processes are in."""
        return self._session

    def kill(self) -> None:
        """Ends whatever is left of the node."""
        kill_sessions([self._session])
        self._process.wait()


@contextmanager
def joined_node(
    address: str, num_cpus: int, environment: Mapping[str, str | None]
) -> Iterator[JoinedNode]:
    """Joins a node, which is gone afterwards."""
    node = JoinedNode(address, num_cpus, environment)
    try:
        yield node
    finally:
        node.kill()
