"""The process per Ray cluster. Owns: creating and adopting drivers, reporting nodes, answering checks, reaping ended jobs.

The only process that has both Ray and an agent token. It holds no state that matters: when it loses Ray it exits and is started
again; jobs run on without it. Must not know: torch, how a job runs, the database.

    python -m workers.agent --service URL --cluster default --address RAY_ADDRESS [--token-file FILE] [--storage ROOT]
"""

import argparse
import logging
import os
import queue
import signal
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError

from workers.agent_jobs import DriverRegistry
from workers.checks import CheckDesk, StorageChecks
from workers.cluster import read_nodes
from workers.link import Hello, ServiceAway, ServiceLink, ServiceRefused
from workers.rank_env import EnvironmentProblem, agent_token, forget_agent_token, prepare_ray_client
from workers.version import code_version
from workers.wire import AgentReport, DesiredReply, NodeInfo

_LOG = logging.getLogger("megatron_ray.agent")
_TICK_S = 2.0
_POLL_S = 20.0
_RETRY_S = 1.0
_CONNECT_S = 5.0
_RAY_AWAY_S = 10.0
_STOP_S = 3.0
EXIT_RAY_LOST = 3
EXIT_BAD_START = 2


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
        self._options, self._token = options, token
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
        """Until stopped (0) or until Ray is lost (EXIT_RAY_LOST). Raises ServiceRefused when the service will not have this agent."""
        link = ServiceLink(self._options.service_url, self._token)
        hello = self._greet(link)
        if hello is None:
            return 0
        try:
            self._dashboard_url = connect_ray(self._options.ray_address, hello.namespace)
        except (RayError, OSError, RuntimeError, ValueError) as error:
            _LOG.error("cannot reach Ray at %s: %s", self._options.ray_address, error)
            return EXIT_RAY_LOST
        threading.Thread(target=self._follow, name="desired", daemon=True).start()
        threading.Thread(target=watch_ray, args=(self._options.ray_address,), name="ray", daemon=True).start()
        registry = DriverRegistry(self._options.service_url, hello.namespace)
        checks = CheckDesk(link)
        storage = StorageChecks(self._options.storage_root or hello.storage_root)
        _LOG.info("cluster %s at %s, namespace %s", self._options.cluster, self._options.ray_address, hello.namespace)
        try:
            self._loop(link, hello, registry, checks, storage)
        except (RayError, OSError, RuntimeError) as error:
            _LOG.error("Ray is lost: %s", error)
            return EXIT_RAY_LOST
        return 0

    def _loop(self, link: ServiceLink, hello: Hello, registry: DriverRegistry, checks: CheckDesk, storage: StorageChecks) -> None:
        while not self._stopping.is_set():
            nodes = read_nodes(storage.results())
            storage.look(nodes)
            self._tell(link, hello, registry, nodes)
            wait_until = time.monotonic() + _TICK_S
            while not self._stopping.is_set() and time.monotonic() < wait_until:
                reply = self._next_reply(0.1 if checks.busy else wait_until - time.monotonic())
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

    def _tell(self, link: ServiceLink, hello: Hello, registry: DriverRegistry, nodes: tuple[NodeInfo, ...]) -> None:
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
        except (ServiceAway, ServiceRefused) as error:
            _LOG.warning("%s", error)

    def _greet(self, link: ServiceLink) -> Hello | None:
        while not self._stopping.is_set():
            try:
                return link.hello()
            except ServiceAway as error:
                _LOG.warning("waiting for the service: %s", error)
                self._stopping.wait(_RETRY_S)
        return None

    def _follow(self) -> None:
        """Long-polls what is wanted, on its own connection."""
        revision = 0
        with ServiceLink(self._options.service_url, self._token) as link:
            while not self._stopping.is_set():
                asked = time.monotonic()
                try:
                    reply = link.desired_jobs(self._options.cluster, revision, _POLL_S)
                except (ServiceAway, ServiceRefused) as error:
                    _LOG.warning("%s", error)
                    self._stopping.wait(_RETRY_S)
                    revision = 0  # a service that comes back with another database counts anew
                    continue
                revision = reply.revision
                self._inbox.put(reply)
                if time.monotonic() - asked < 0.05:
                    self._stopping.wait(0.05)


def connect_ray(address: str, namespace: str) -> str | None:
    """Connects this process to a running cluster; returns its dashboard's URL, when it has one. Raises OSError or Ray's own."""
    knock(address)  # Ray itself would try for minutes before it says that nobody is there
    context = ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.WARNING)
    return f"http://{context.dashboard_url}" if context.dashboard_url else None


def knock(address: str) -> None:
    """Raises OSError when nobody listens at host:port."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


def watch_ray(address: str) -> None:
    """Ends the process when Ray's head has been away for a while: calls into Ray block for a minute before they fail."""
    away_since: float | None = None
    while True:
        time.sleep(_TICK_S)
        try:
            knock(address)
            away_since = None
        except OSError as error:
            now = time.monotonic()
            away_since = away_since or now
            if now - away_since > _RAY_AWAY_S:
                _LOG.error("Ray at %s is lost: %s", address, error)
                os._exit(EXIT_RAY_LOST)


def parse(arguments: Sequence[str] | None = None) -> tuple[AgentOptions, Path | None]:
    """Command line to options and token file."""
    parser = argparse.ArgumentParser(prog="python -m workers.agent", description="Connects one Ray cluster to the service.")
    parser.add_argument("--service", "--service-url", dest="service", required=True, help="URL of the service")
    parser.add_argument("--cluster", default="default", help="name of this cluster in job specs")
    parser.add_argument("--address", "--ray-address", dest="address", required=True, help="host:port of Ray's head")
    parser.add_argument("--token-file", type=Path, help="file with the agent's token; else from the environment")
    parser.add_argument("--storage", help="folder or URI that all nodes must see; else what the service says")
    given = parser.parse_args(arguments)
    return AgentOptions(given.service, given.cluster, given.address, given.storage), given.token_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 after SIGTERM or SIGINT, 2 when it cannot start, 3 when Ray is lost."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options, token_file = parse(arguments)
    try:
        token = agent_token(token_file)
    except EnvironmentProblem as problem:
        _LOG.error("%s", problem)
        return EXIT_BAD_START
    forget_agent_token()
    prepare_ray_client()
    agent = Agent(options, token)
    return _run_until_signal(agent)


def _run_until_signal(agent: Agent) -> int:
    """The agent works beside the main thread: ray.init puts signal handlers of its own only where they can be put back."""
    outcome: list[int] = []

    def work() -> None:
        try:
            outcome.append(agent.run())
        except ServiceRefused as error:
            _LOG.error("%s", error)
            outcome.append(EXIT_BAD_START)

    thread = threading.Thread(target=work, name="agent", daemon=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    thread.start()
    stopped_at: float | None = None
    while thread.is_alive():
        thread.join(0.2)
        if agent.stopping:
            stopped_at = stopped_at or time.monotonic()
            if time.monotonic() - stopped_at > _STOP_S:
                os._exit(0)  # a call into Ray that does not come back; there is nothing to lose
    return outcome[0] if outcome else 1


if __name__ == "__main__":
    raise SystemExit(main())
