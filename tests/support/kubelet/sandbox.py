"""Processes in namespaces: what a container runtime does for a pod.

Owns: the network of one machine, a pod's namespaces, a container's process. Runs inside
the namespaces that `command_inside` enters, as their root. Must not know: Kubernetes.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ENTER = Path(__file__).with_name("enter_container.py")
BRIDGE = "pods"
GATEWAY = "10.77.0.1"
_START_S = 60.0
_END_S = 60.0
TOOLS = ("unshare", "nsenter", "ip")


def why_not() -> str | None:
    """Returns why this machine cannot run pods; None if it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    result = subprocess.run(command_inside(["true"]), capture_output=True, text=True)
    if result.returncode != 0:
        return f"namespaces are not permitted: {result.stderr.strip()}"
    return None


def command_inside(command: Sequence[str]) -> list[str]:
    """Returns the command line that runs a command in namespaces of its own.

    All processes that it starts end with it.
    """
    words = [
        "unshare",
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]
    if os.geteuid() != 0:
        words += ["--user", "--map-root-user"]
    return [*words, *command]


def make_network() -> None:
    """Makes the bridge that all pods are connected to."""
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", BRIDGE, "type", "bridge")
    _run("ip", "address", "add", f"{GATEWAY}/16", "dev", BRIDGE)
    _run("ip", "link", "set", BRIDGE, "up")


class Sandbox:
    """The namespaces that the containers of one pod share: network, host name, processes."""

    def __init__(self, name: str, address: str, number: int) -> None:
        """`number` is unique among all sandboxes."""
        self.address = address
        words = [
            "unshare",
            "--net",
            "--uts",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        # A pod's first process ends with the signal that ends all others of the pod.
        script = f"hostname {name}; exec sleep infinity"
        self.process = subprocess.Popen(
            [*words, "sh", "-c", script], start_new_session=True
        )
        self.first_pid = first_child(self.process.pid)
        self._connect(f"pod{number}")

    def _connect(self, link: str) -> None:
        inside = ["nsenter", f"--target={self.first_pid}", "--net", "ip"]
        peer = ("peer", "name", "eth0", "netns", str(self.first_pid))
        _run("ip", "link", "add", link, "type", "veth", *peer)
        _run("ip", "link", "set", link, "master", BRIDGE, "up")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "address", "add", f"{self.address}/16", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        # It leads nowhere, but programs ask the kernel for the address of this route.
        _run(*inside, "route", "add", "default", "via", GATEWAY)

    def kill(self) -> None:
        """Ends the sandbox and all processes that share its process namespace."""
        self.process.kill()
        self.process.wait(_END_S)


@dataclass(frozen=True)
class Mount:
    """A file or folder of the machine, visible in a container."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class ContainerProcess:
    """What a container's process is made of."""

    command: list[str]
    environment: dict[str, str]
    mounts: list[Mount]
    root: str
    """An empty folder."""
    working_directory: str
    user: int
    read_only_root: bool
    allow_privilege_escalation: bool
    niceness: int


class Process:
    """One run of a container."""

    def __init__(
        self,
        container: ContainerProcess,
        sandbox: Sandbox,
        *,
        shares_processes: bool,
        log: Path,
    ) -> None:
        description = Path(f"{container.root}.json")
        description.write_text(json.dumps(asdict(container)))
        words = ["nsenter", f"--target={sandbox.first_pid}", "--net", "--uts"]
        if shares_processes:
            words += ["--pid", "--", "unshare", "--mount"]
        else:
            words += ["--", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        words += ["--", sys.executable, "-I", str(ENTER), str(description)]
        self._environment = container.environment
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # Either nsenter or unshare waits for the container's first process.
        self.pid = first_child(self._process.pid)

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the container's first process, if it runs."""
        if self.exit_code is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """Returns whether it has ended within that time."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Ends all processes of the container, or its first one and its descendants."""
        if self.exit_code is not None:
            return
        for pid in [self.pid, *descendants(self.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(_END_S)

    def run(self, command: Sequence[str], timeout_s: float) -> bool:
        """Runs a command in the container; returns whether it succeeded in time."""
        words = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--pid", "--mount"]
        words += ["--user", "--preserve-credentials", "--wd"]
        try:
            result = subprocess.run(
                [*words, "--", *command],
                env=self._environment,
                capture_output=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            return False
        return result.returncode == 0


def first_child(pid: int) -> int:
    """Returns the process that another one has forked, once it has.

    The parent's own pid when it has ended before.
    """
    deadline = time.monotonic() + _START_S
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while time.monotonic() < deadline:
        try:
            pids = children.read_text().split()
        except FileNotFoundError:
            return pid
        if pids:
            return int(pids[0])
        time.sleep(0.005)
    # It ended without a child, and is not waited for yet.
    return pid


def descendants(pid: int) -> list[int]:
    """Returns all living descendants of a process."""
    pids = []
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    for child in children:
        pids += [int(child), *descendants(int(child))]
    return pids


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
