"""The process per Ray cluster.

Owns: creating and adopting drivers, reporting nodes, answering checks, reaping ended
jobs.

The only process that has both Ray and an agent token. It holds no state that matters:
when it loses Ray it exits and is started again; jobs run on without it. Must not know:
torch, how a job runs, the database.
"""

import logging
import os
import queue
import socket
import threading
import time
import uuid
from dataclasses import dataclass

import ray
from ray.exceptions import RayError

from workers.agent.checks import CheckRunner, StorageChecks
from workers.agent.driver_registry import DriverRegistry
from workers.protocol.version import code_version
from workers.protocol.wire import AgentReport, DesiredReply, NodeInfo
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
_RETRY_S = 1.0
_CONNECT_S = 5.0
_RAY_AWAY_S = 10.0
EXIT_RAY_LOST = 3


@dataclass(frozen=True)
class AgentOptions:
    """What the command line says."""

    service_url: str
    cluster: str
    ray_address: str
    storage_root: str | None = None


class Agent:
    """One run of the agent; `stop` may be called from a signal handler."""

    def __init__(self, options: AgentOptions, token: str) -> None:
        self._options = options
        self._token = token
        self._agent_id = f"agent-{uuid.uuid4().hex[:12]}"
        self._inbox: queue.SimpleQueue[DesiredReply | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._dashboard_url: str | None = None

    def stop(self) -> None:
        """Ends `run` soon; jobs are not touched."""
        self._stopping.set()
        self._inbox.put(None)

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def run(self) -> int:
        """Until stopped (0) or until Ray is lost (EXIT_RAY_LOST).

        Raises ServiceRefusedError when the service will not have this agent.
        """
        link = ServiceClient(self._options.service_url, self._token)
        hello = self._greet(link)
        if hello is None:
            return 0
        try:
            self._dashboard_url = connect_ray(self._options.ray_address, hello.namespace)
        except (RayError, OSError, RuntimeError, ValueError) as error:
            _LOG.error("cannot reach Ray at %s: %s", self._options.ray_address, error)
            return EXIT_RAY_LOST
        threading.Thread(target=self._follow, name="desired", daemon=True).start()
        threading.Thread(
            target=watch_ray, args=(self._options.ray_address,), name="ray", daemon=True
        ).start()
        registry = DriverRegistry(self._options.service_url, hello.namespace)
        checks = CheckRunner(link)
        storage = StorageChecks(self._options.storage_root or hello.storage_root)
        _LOG.info(
            "cluster %s at %s, namespace %s",
            self._options.cluster,
            self._options.ray_address,
            hello.namespace,
        )
        try:
            self._loop(link, hello, registry, checks, storage)
        except (RayError, OSError, RuntimeError) as error:
            _LOG.error("Ray is lost: %s", error)
            return EXIT_RAY_LOST
        return 0

    def _loop(
        self,
        link: ServiceClient,
        hello: Hello,
        registry: DriverRegistry,
        checks: CheckRunner,
        storage: StorageChecks,
    ) -> None:
        while not self._stopping.is_set():
            nodes = read_nodes(storage.results())
            storage.look(nodes)
            self._tell(link, hello, registry, nodes)
            wait_until = time.monotonic() + _TICK_S
            while not self._stopping.is_set() and time.monotonic() < wait_until:
                reply = self._next_reply(
                    0.1 if checks.busy else wait_until - time.monotonic()
                )
                if reply is not None:
                    registry.want(reply)
                    checks.take(reply.checks)
                    registry.reconcile()
                checks.answer()
            registry.reconcile()

    def _next_reply(self, timeout_s: float) -> DesiredReply | None:
        try:
            return self._inbox.get(timeout=max(0.01, timeout_s))
        except queue.Empty:
            return None

    def _tell(
        self,
        link: ServiceClient,
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
            drivers=registry.statuses(),
            orphans=registry.orphans(),
        )
        try:
            link.report(report)
        except (ServiceUnavailableError, ServiceRefusedError) as error:
            _LOG.warning("%s", error)

    def _greet(self, link: ServiceClient) -> Hello | None:
        while not self._stopping.is_set():
            try:
                return link.hello()
            except ServiceUnavailableError as error:
                _LOG.warning("waiting for the service: %s", error)
                self._stopping.wait(_RETRY_S)
        return None

    def _follow(self) -> None:
        """Long-polls what is wanted, on its own connection."""
        revision = 0
        with ServiceClient(self._options.service_url, self._token) as link:
            while not self._stopping.is_set():
                asked = time.monotonic()
                try:
                    reply = link.desired_jobs(self._options.cluster, revision, _POLL_S)
                except (ServiceUnavailableError, ServiceRefusedError) as error:
                    _LOG.warning("%s", error)
                    self._stopping.wait(_RETRY_S)
                    revision = (
                        0  # a service that comes back with another database counts anew
                    )
                    continue
                revision = reply.revision
                self._inbox.put(reply)
                if time.monotonic() - asked < 0.05:
                    self._stopping.wait(0.05)


def connect_ray(address: str, namespace: str) -> str | None:
    """Connects this process to a running cluster; returns its dashboard's URL, when it
    has one.

    Raises OSError or Ray's own.
    """
    probe_port(
        address
    )  # Ray itself would try for minutes before it says that nobody is there
    context = ray.init(
        address=address,
        namespace=namespace,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    return f"http://{context.dashboard_url}" if context.dashboard_url else None


def probe_port(address: str) -> None:
    """Raises OSError when nobody listens at host:port."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


def watch_ray(address: str) -> None:
    """Ends the process when Ray's head has been away for a while: calls into Ray block
    for a minute before they fail.
    """
    away_since: float | None = None
    while True:
        time.sleep(_TICK_S)
        try:
            probe_port(address)
            away_since = None
        except OSError as error:
            now = time.monotonic()
            away_since = away_since or now
            if now - away_since > _RAY_AWAY_S:
                _LOG.error("Ray at %s is lost: %s", address, error)
                os._exit(EXIT_RAY_LOST)
