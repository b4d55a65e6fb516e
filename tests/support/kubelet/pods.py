"""Pods as the kubelet runs them.

Owns: the order in which containers start, restarts, probes, the end of a pod. Must not
know: which pods there are, KubeRay.
"""

import http.client
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.kubelet.pod_values import (
    Objects,
    PodFacts,
    environment,
    expanded,
    mounts,
)
from tests.support.kubelet.sandbox import ContainerProcess, Mount, Process, Sandbox

Json = dict[str, Any]
_TICK_S = 0.1
_FIRST_BACK_OFF_S = 10.0
_LONGEST_BACK_OFF_S = 300.0
_LOWER_PRIORITY_NICENESS = 10
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@dataclass(frozen=True)
class Image:
    """What all containers get from their image; this machine has the files."""

    environment: Mapping[str, str]
    working_directory: str
    folders: tuple[Path, ...]
    """Where the files are that the image would contain."""


@dataclass(frozen=True)
class PodSetup:
    """What a pod is made of."""

    facts: PodFacts
    spec: Json
    objects: Objects
    image: Image
    folder: Path
    """An empty folder of the pod's own."""

    def container_process(self, container: Json, run: int) -> ContainerProcess:
        """Returns the process of a container.

        Raises KeyError when the container refers to something that is missing.
        """
        variables = environment(container, self.objects, self.facts)
        words = [*container.get("command", ()), *container.get("args", ())]
        assert words, "the command of the image is not known here"
        security = container.get("securityContext", {})
        root = self.folder / f"{container['name']}.{run}.root"
        root.mkdir()
        files = ("hosts", "resolv.conf")
        return ContainerProcess(
            command=[expanded(word, variables) for word in words],
            environment={**self.image.environment, **variables},
            mounts=[
                *mounts(container, self.spec, self.objects, self.folder),
                *[Mount(str(self.folder / name), f"/etc/{name}") for name in files],
                *[Mount(str(path), str(path), True) for path in self.image.folders],
            ],
            root=str(root),
            working_directory=self.image.working_directory,
            user=self.spec["securityContext"]["runAsUser"],
            read_only_root=security.get("readOnlyRootFilesystem", False),
            allow_privilege_escalation=security.get("allowPrivilegeEscalation", True),
            niceness=self.niceness(),
        )

    def niceness(self) -> int:
        """Returns by how much the pod gives way to others.

        Pods of all machines of the cluster share this one: while ranks compute, those of
        a higher priority must be able to start within Ray's own time limits.
        """
        priorities = self.objects.priorities
        priority = priorities[self.spec["priorityClassName"]]
        if priority < max(priorities.values()):
            return _LOWER_PRIORITY_NICENESS
        return 0


@dataclass
class ProbeState:
    """A probe's results since the container's last start."""

    kind: str
    probe: Json
    due_at: float
    failures: int = 0
    successes: int = 0


class Container:
    """A container through its restarts."""

    def __init__(self, setup: PodSetup, container: Json, sandbox: Sandbox) -> None:
        self.name: str = container["name"]
        self.restarts = 0
        self.passed: set[str] = set()
        """The kinds of its probes that have ever succeeded."""
        self.process: Process | None = None
        self._setup = setup
        self._container = container
        self._sandbox = sandbox
        self._ready: set[str] = set()

    @property
    def has_started(self) -> bool:
        """Whether its startup probe has passed since its last start."""
        has_probe = "startupProbe" in self._container
        return self.process is not None and (not has_probe or "startupProbe" in self._ready)

    @property
    def is_ready(self) -> bool:
        """Whether it takes part in Services, by its own probe."""
        has_probe = "readinessProbe" in self._container
        return self.has_started and (not has_probe or "readinessProbe" in self._ready)

    @property
    def probes(self) -> set[str]:
        """The kinds of its probes."""
        return {kind for kind in PROBES if kind in self._container}

    def run_once(self, should_stop: Callable[[], bool]) -> int | None:
        """Starts it and probes it to its end; returns its exit code, None when stopped."""
        process = self._start()
        probes = [
            ProbeState(
                kind,
                self._container[kind],
                time.monotonic() + self._container[kind].get("initialDelaySeconds", 0),
            )
            for kind in self.probes
        ]
        while process.exit_code is None:
            if should_stop():
                return None
            for state in probes:
                # The others wait until the container has started.
                if state.kind == "startupProbe" or self.has_started:
                    self._probe(state, process)
            time.sleep(_TICK_S)
        return process.exit_code

    def exec_succeeds(self, command: list[str], timeout_s: float) -> bool:
        """Runs a command in the running container, as probes and hooks do."""
        assert self.process is not None
        return self.process.run(command, timeout_s)

    def pre_stop(self) -> list[str] | None:
        """Returns the command that runs before the container is asked to end."""
        command: list[str] | None = (
            self._container.get("lifecycle", {})
            .get("preStop", {})
            .get("exec", {})
            .get("command")
        )
        return command

    def _start(self) -> Process:
        self._ready.clear()
        process = Process(
            self._setup.container_process(self._container, self.restarts),
            self._sandbox,
            shares_processes=self._setup.spec.get("shareProcessNamespace", False),
            log=self._setup.folder / f"{self.name}.log",
        )
        self.process = process
        return process

    def _probe(self, state: ProbeState, process: Process) -> None:
        is_over = state.kind == "startupProbe" and state.kind in self._ready
        if is_over or time.monotonic() < state.due_at:
            return
        state.due_at = time.monotonic() + state.probe.get("periodSeconds", 10)
        if self._passes(state.probe):
            state.failures = 0
            self._ready.add(state.kind)
            self.passed.add(state.kind)
            return
        state.failures += 1
        if state.failures < state.probe.get("failureThreshold", 3):
            return
        self._ready.discard(state.kind)
        if state.kind != "readinessProbe":
            process.kill()

    def _passes(self, probe: Json) -> bool:
        timeout_s = probe.get("timeoutSeconds", 1)
        if "exec" in probe:
            return self.exec_succeeds(probe["exec"]["command"], timeout_s)
        action = probe.get("httpGet") or probe["tcpSocket"]
        port = action["port"]
        for named in self._container.get("ports", ()):
            if named["name"] == port:
                port = named["containerPort"]
        address = (self._sandbox.address, int(port))
        try:
            if "httpGet" in probe:
                return _answers(address, action["path"], timeout_s)
            socket.create_connection(address, timeout_s).close()
        except OSError:
            return False
        return True


def _answers(address: tuple[str, int], path: str, timeout_s: float) -> bool:
    """Whether GET gives a success or a redirect. Raises OSError."""
    connection = http.client.HTTPConnection(*address, timeout=timeout_s)
    try:
        connection.request("GET", path)
        return 200 <= connection.getresponse().status < 400
    except http.client.HTTPException:
        return False
    finally:
        connection.close()


@dataclass
class Pod:
    """A pod from its first container to its end."""

    setup: PodSetup
    sandbox: Sandbox
    containers: list[Container] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    """What the kubelet would report as an event: a container that cannot be started."""
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Starts the pod's containers, in the background."""
        self._in_background(self._start_containers)

    @property
    def is_ready(self) -> bool:
        """Whether all of its containers are."""
        ready = {item.name for item in self.containers if item.is_ready}
        return {item["name"] for item in self.setup.spec["containers"]} <= ready

    def container(self, name: str) -> Container:
        """Returns the container of that name, once it has been started."""
        (container,) = [item for item in self.containers if item.name == name]
        return container

    def delete(self) -> float:
        """Ends the pod as Kubernetes does; returns the seconds it took.

        The hooks and the time after SIGTERM share the grace period.
        """
        started = time.monotonic()
        deadline = started + self.setup.spec.get("terminationGracePeriodSeconds", 30)
        self._stopping.set()
        for container in self.containers:
            command = container.pre_stop()
            if command is not None and container.process is not None:
                container.exec_succeeds(command, deadline - time.monotonic())
        for container in self.containers:
            if container.process is not None:
                container.process.signal(signal.SIGTERM)
        for container in self.containers:
            if container.process is not None:
                container.process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()
        return time.monotonic() - started

    def kill(self) -> None:
        """Ends all processes of the pod at once, as when its machine is lost."""
        self._stopping.set()
        self._kill_containers()
        self.sandbox.kill()
        for thread in self._threads:
            thread.join()
        # One may have been started meanwhile.
        self._kill_containers()

    def _kill_containers(self) -> None:
        for container in self.containers:
            if container.process is not None:
                container.process.kill()

    def kill_container(self, name: str) -> None:
        """Ends all processes of one container; the pod stays and starts it again."""
        process = self.container(name).process
        assert process is not None
        process.kill()

    def _start_containers(self) -> None:
        spec = self.setup.spec
        for item in spec.get("initContainers", ()):
            container = self._add(item)
            if item.get("restartPolicy") == "Always":
                self._in_background(partial(self._keep_running, container))
                while not container.has_started and not self._stopping.is_set():
                    time.sleep(_TICK_S)
            else:
                self._run_to_success(container)
            if self._stopping.is_set():
                return
        for item in spec["containers"]:
            container = self._add(item)
            self._in_background(partial(self._keep_running, container))

    def _add(self, item: Json) -> Container:
        container = Container(self.setup, item, self.sandbox)
        self.containers.append(container)
        return container

    def _run_to_success(self, container: Container) -> None:
        while not self._stopping.is_set():
            if container.run_once(self._stopping.is_set) == 0:
                return
            self._back_off(container)

    def _keep_running(self, container: Container) -> None:
        while not self._stopping.is_set():
            container.run_once(self._stopping.is_set)
            self._back_off(container)

    def _back_off(self, container: Container) -> None:
        """Waits before a restart: not before the first, then twice as long each time."""
        delay = 0.0
        if container.restarts > 0:
            delay = _FIRST_BACK_OFF_S * 2 ** (container.restarts - 1)
        self._stopping.wait(min(delay, _LONGEST_BACK_OFF_S))
        container.restarts += 1

    def _in_background(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except (KeyError, OSError, AssertionError) as error:
                self.errors.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        self._threads.append(thread)
        thread.start()
