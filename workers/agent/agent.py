"""Connects one Ray cluster to the service: the agent.

Owns: connecting, reporting nodes, polling for desired jobs, detecting that Ray is lost.

The agent is the only process that uses both Ray and an agent token. All of its state
can be rebuilt: when it loses Ray it exits and is restarted, and jobs keep running
meanwhile. Must not know: torch, how a job runs, the database.
"""

import logging
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import RayError

from workers.agent.checks import CheckRunner, StorageChecks
from workers.agent.driver_registry import DriverRegistry
from workers.agent.idleness import Idleness
from workers.protocol.version import code_version
from workers.protocol.wire import AgentReport, DesiredReply, NodeGroup, NodeInfo
from workers.ray.nodes import read_nodes
from workers.service_client import (
    Hello,
    ServiceClient,
    ServiceRefusedError,
    ServiceUnavailableError,
)

_LOG = logging.getLogger("megatron_ray.agent")
_TICK_S = 2.0
_POLL_S = 20.0
_MIN_POLL_S = 0.05
_CHECK_TICK_S = 0.1
_RETRY_S = 1.0
_CONNECT_S = 5.0
_RAY_AWAY_S = 10.0
_FIRST_CHECKS_S = 30.0
EXIT_RAY_LOST = 3


@dataclass(frozen=True)
class AgentOptions:
    """Options of the command line."""

    service_url: str
    cluster: str
    ray_address: str
    storage_root: str | None = None
    node_groups: tuple[NodeGroup, ...] = ()
    """Nodes that an autoscaler may give to the cluster."""
    until_idle: bool = False
    """Whether to exit once all jobs of the cluster have ended."""


class Agent:
    """One run of the agent; `stop` may be called from a signal handler."""

    def __init__(self, options: AgentOptions, token: str) -> None:
        self._options = options
        self._token = token
        self._agent_id = f"agent-{uuid.uuid4().hex[:12]}"
        self._replies: queue.SimpleQueue[DesiredReply | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._dashboard_url: str | None = None

    def stop(self) -> None:
        """Makes `run` return soon; jobs keep running."""
        self._stopping.set()
        # `_loop` may be blocked on the queue of replies.
        self._replies.put(None)

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def run(self) -> int:
        """Runs until stopped (returns 0) or until Ray is lost (returns EXIT_RAY_LOST).

        With `until_idle` also until all jobs have ended: returns 0 if all that were active
        meanwhile have succeeded, else 1. Raises ServiceRefusedError when the service
        refuses this agent.
        """
        options = self._options
        with ServiceClient(options.service_url, self._token) as client:
            # The service first, because its reply holds the Ray namespace to join.
            hello = self._connect_service(client)
            if hello is None:
                return 0
            try:
                self._dashboard_url = connect_ray(options.ray_address, hello.namespace)
            except (RayError, OSError, RuntimeError, ValueError) as error:
                _LOG.error("cannot reach Ray at %s: %s", options.ray_address, error)
                return EXIT_RAY_LOST
            _LOG.info(
                "cluster %s at %s, namespace %s",
                options.cluster,
                options.ray_address,
                hello.namespace,
            )
            self._start_threads()
            try:
                return self._loop(client, hello)
            except (RayError, OSError, RuntimeError) as error:
                _LOG.error("Ray is lost: %s", error)
                return EXIT_RAY_LOST

    def _connect_service(self, client: ServiceClient) -> Hello | None:
        """Returns the service's settings once it answers; None when stopped before."""
        while not self._stopping.is_set():
            try:
                return client.hello()
            except ServiceUnavailableError as error:
                _LOG.warning("waiting for the service: %s", error)
                self._stopping.wait(_RETRY_S)
        return None

    def _start_threads(self) -> None:
        threading.Thread(target=self._poll_desired, name="desired", daemon=True).start()
        address = self._options.ray_address
        threading.Thread(target=watch_ray, args=(address,), name="ray", daemon=True).start()

    def _loop(self, client: ServiceClient, hello: Hello) -> int:
        """Returns the exit code, once stopped or idle."""
        # Created after ray.init, because they call into the connected cluster.
        group_names = [group.name for group in self._options.node_groups]
        registry = DriverRegistry(
            self._options.service_url, hello.namespace, node_groups=group_names
        )
        checks = CheckRunner(client)
        storage = StorageChecks(
            self._options.storage_root or hello.storage_root, group_names
        )
        own_node = ray.get_runtime_context().get_node_id()
        idleness = Idleness()
        began = time.monotonic()
        while not self._stopping.is_set():
            nodes = read_nodes(storage.results())
            require_alive(nodes, own_node)
            storage.update(nodes)
            if not self._waits_for_nodes(nodes, began):
                self._report(client, hello, registry, nodes)
            # Replies are processed at once. Without a reply, drivers are still
            # reconciled once per tick, so that one that died is created again.
            tick_end = time.monotonic() + _TICK_S
            while not self._stopping.is_set() and time.monotonic() < tick_end:
                timeout_s = tick_end - time.monotonic()
                if checks.has_running:
                    timeout_s = _CHECK_TICK_S
                reply = self._next_reply(timeout_s)
                if reply is not None:
                    idleness.set_states(reply.states)
                    registry.set_desired(reply)
                    checks.start((*reply.checks, *reply.resume_checks))
                    registry.reconcile()
                checks.send_results()
            registry.reconcile()
            exit_code = self._idle_code(idleness, registry)
            if exit_code is not None:
                return exit_code
        return 0

    def _idle_code(self, idleness: Idleness, registry: DriverRegistry) -> int | None:
        """Returns the code to exit with when no job is left, if that is asked for."""
        if not self._options.until_idle:
            return None
        has_actors = registry.has_actors()
        exit_code = idleness.exit_code(time.monotonic(), has_actors=has_actors)
        if exit_code is not None:
            _LOG.info("no job of cluster %s is left", self._options.cluster)
        return exit_code

    def _waits_for_nodes(self, nodes: Sequence[NodeInfo], began: float) -> bool:
        """Whether the first report waits for the nodes' storage to be checked.

        A cluster that is made for one job is complete when its agent starts, and the job
        is judged by the first report.
        """
        if not self._options.until_idle or time.monotonic() - began > _FIRST_CHECKS_S:
            return False
        for node in nodes:
            if node.alive and node.storage_ok is None:
                return True
        return False

    def _next_reply(self, timeout_s: float) -> DesiredReply | None:
        try:
            return self._replies.get(timeout=max(0.01, timeout_s))
        except queue.Empty:
            return None

    def _report(
        self,
        client: ServiceClient,
        hello: Hello,
        registry: DriverRegistry,
        nodes: tuple[NodeInfo, ...],
    ) -> None:
        report = AgentReport(
            cluster=self._options.cluster,
            agent_id=self._agent_id,
            code_version=code_version(),
            ray_version=ray.__version__,
            namespace=hello.namespace,
            dashboard_url=self._dashboard_url,
            nodes=nodes,
            node_groups=self._options.node_groups,
            drivers=registry.statuses(),
            orphans=registry.orphans(),
        )
        # A failed report is not sent again: the next one replaces it.
        try:
            client.report(report)
        except (ServiceUnavailableError, ServiceRefusedError) as error:
            _LOG.warning("%s", error)

    def _poll_desired(self) -> None:
        """Long-polls the desired jobs, on a connection of its own."""
        revision = 0
        with ServiceClient(self._options.service_url, self._token) as client:
            while not self._stopping.is_set():
                started = time.monotonic()
                try:
                    reply = client.desired_jobs(self._options.cluster, revision, _POLL_S)
                except (ServiceUnavailableError, ServiceRefusedError) as error:
                    _LOG.warning("%s", error)
                    self._stopping.wait(_RETRY_S)
                    # A restarted service may use another database, whose revisions
                    # start over.
                    revision = 0
                    continue
                revision = reply.revision
                self._replies.put(reply)
                # Avoids a busy loop if the service replies without waiting.
                if time.monotonic() - started < _MIN_POLL_S:
                    self._stopping.wait(_MIN_POLL_S)


def connect_ray(address: str, namespace: str) -> str | None:
    """Connects this process to a running cluster.

    Returns the URL of its dashboard, None if it has none. Raises OSError, ValueError for
    an address that is not host:port, or Ray's own errors.
    """
    # Fails within seconds; ray.init would retry for minutes.
    probe_port(address)
    # Logs of ranks are written to the job's folder, so Ray need not forward them here.
    context = ray.init(
        address=address,
        namespace=namespace,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    if not context.dashboard_url:
        return None
    return f"http://{context.dashboard_url}"


def probe_port(address: str) -> None:
    """Connects to host:port and disconnects; an IPv6 host is in brackets.

    Raises OSError when no process listens there, ValueError for a malformed address.
    """
    host, _, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if not host or not port.isdecimal() or (":" in host and not is_bracketed):
        raise ValueError("--address must be host:port, or [host]:port for IPv6")
    host = host.removeprefix("[").removesuffix("]")
    socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


def require_alive(nodes: Sequence[NodeInfo], node_id: str) -> None:
    """Raises ConnectionError when Ray counts this node as dead.

    Without its own node a process can still read Ray's state, but every task and every
    actor that it starts fails.
    """
    for node in nodes:
        if node.node_id == node_id and not node.alive:
            raise ConnectionError(f"the agent's own node at {node.address} has died")


def watch_ray(address: str) -> None:
    """Ends the process when Ray's head has been unreachable for _RAY_AWAY_S seconds.

    Without it, calls into Ray would block for a minute before they fail.
    """
    away_since: float | None = None
    while True:
        time.sleep(_TICK_S)
        try:
            probe_port(address)
            away_since = None
        except OSError as error:
            # A single failed connection may only mean that the machine is busy.
            now = time.monotonic()
            away_since = away_since or now
            if now - away_since > _RAY_AWAY_S:
                _LOG.error("Ray at %s is lost: %s", address, error)
                os._exit(EXIT_RAY_LOST)
