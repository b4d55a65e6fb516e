"""Starts Ray, service and agent of a local stack and waits until each works.

Every wait polls the interruption flag. Must not know: the order of a start, restarts.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from service.client import Client
from service.http.tokens import Scope
from service.local_stack.interruption import StackError
from service.local_stack.options import StackOptions
from service.local_stack.processes import LABELS, StackProcesses
from service.local_stack.ray_head import (
    PORT_NAMES,
    available_cpus,
    free_ports,
    head_command,
    ray_environment,
)

# Reading one file is cheap enough for a short period.
_PORT_FILE_POLL_S = 0.03
# A free port may be taken before Ray binds it.
_RAY_TRIES = 3
_RAY_START_S = 90.0
# The agent does not signal its readiness, and importing Ray alone may take this long.
_AGENT_SETTLES_S = 10.0


def start_service(processes: StackProcesses, options: StackOptions, port: int) -> None:
    """Launches the service; with port 0 the kernel chooses."""
    # A port file left by the previous service would look like a finished start.
    port_file = _port_file(processes)
    port_file.unlink(missing_ok=True)
    environment = {
        "MEGATRON_RAY_DATA_DIR": str(options.data_dir),
        "MEGATRON_RAY_HOST": "127.0.0.1",
        "MEGATRON_RAY_PORT": str(port),
        "MEGATRON_RAY_PORT_FILE": str(port_file),
        "MEGATRON_RAY_TOKENS_FILE": str(processes.files.tokens_file),
        # Jobs run as the same user, so the operating system decides what they may open.
        "MEGATRON_RAY_SINGLE_USER": "1",
    }
    processes.launch("service", list(options.service_command), environment)


def wait_for_service(processes: StackProcesses, options: StackOptions) -> None:
    """Returns once the service listens, with its address in the record.

    Raises StackError when it exits or the ready timeout has passed.
    """
    port_file = _port_file(processes)
    child = processes.children["service"]
    # The service writes its port file once it listens; with port 0 nothing else names
    # the port.
    deadline = time.monotonic() + options.ready_timeout_s
    while not port_file.exists():
        processes.sleep(_PORT_FILE_POLL_S)
        if child.has_ended():
            log_tail = processes.files.log_tail("service")
            raise StackError("the service exited during startup", log_tail)
        if time.monotonic() > deadline:
            processes.kill("service")
            raise StackError(
                f"the service did not start within {options.ready_timeout_s:.0f} s",
                processes.files.log_tail("service"),
            )
    child.ready_at = time.monotonic()
    port = int(port_file.read_text())
    processes.files.save_port(port)
    processes.update_record(
        url=f"http://127.0.0.1:{port}",
        ports={**processes.record.ports, "service": port},
    )


def start_ray(processes: StackProcesses, options: StackOptions) -> None:
    """Starts a Ray head and returns once its GCS is healthy.

    Raises StackError after the last try.
    """
    num_cpus = options.num_cpus or available_cpus()
    for attempt in range(1, _RAY_TRIES + 1):
        # New ports each time, recorded before the launch.
        ports = free_ports(PORT_NAMES)
        dashboard_url = f"http://127.0.0.1:{ports['ray_dashboard']}"
        processes.update_record(
            ports={**processes.record.ports, **ports},
            ray_address=f"127.0.0.1:{ports['ray_gcs']}",
            dashboard_url=dashboard_url,
        )
        # Another folder for each try: a failed one may leave session files behind.
        folder_name = "ray"
        if attempt > 1:
            folder_name = str(attempt)
        ray_dir = Path(processes.record.temp_dir) / folder_name
        command = head_command(ports, ray_dir, num_cpus)
        processes.launch("ray", command, _ray_environment(processes))
        if _wait_for_ray(processes, dashboard_url):
            return
        processes.kill("ray")
    raise StackError("Ray did not start", processes.files.log_tail("ray"))


def _wait_for_ray(processes: StackProcesses, dashboard_url: str) -> bool:
    """Returns False when Ray exits or the timeout has passed."""
    child = processes.children["ray"]
    deadline = time.monotonic() + _RAY_START_S
    # trust_env=False: a proxy from the environment cannot reach this loopback address.
    with httpx.Client(timeout=2.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            processes.sleep()
            if child.has_ended():
                return False
            try:
                if client.get(f"{dashboard_url}/api/gcs_healthz").status_code == 200:
                    child.ready_at = time.monotonic()
                    return True
            except httpx.HTTPError:
                pass  # not listening yet
    return False


def start_agent(processes: StackProcesses, options: StackOptions) -> None:
    """Launches the agent; service and Ray must be in the record."""
    record = processes.record
    command = [
        *options.agent_command,
        "--service",
        record.url,
        "--address",
        record.ray_address,
        "--cluster",
        "default",
    ]
    environment = _ray_environment(processes)
    environment["MEGATRON_RAY_AGENT_TOKEN"] = processes.files.tokens()[Scope.AGENT]
    # An inherited token file of another service would conflict with the token.
    environment["MEGATRON_RAY_AGENT_TOKEN_FILE"] = None
    processes.launch("agent", command, environment)
    processes.children["agent"].ready_at = time.monotonic() + _AGENT_SETTLES_S


def wait_until_ready(
    processes: StackProcesses, options: StackOptions, progress: Callable[[str], None]
) -> None:
    """Returns once the service reports an agent with a Ray node.

    Raises StackError when a process exits or the ready timeout has passed.
    """
    deadline = time.monotonic() + options.ready_timeout_s
    with Client(processes.record.url, processes.record.token) as client:
        while True:
            ready, state = client.ready()
            if ready:
                return
            reason = _not_ready_reason(state)
            progress(f"waiting: {reason}")
            processes.sleep()
            for name, child in processes.children.items():
                if child.has_ended():
                    raise StackError(
                        f"{LABELS[name]} exited during startup",
                        processes.files.log_tail(name),
                    )
            if time.monotonic() > deadline:
                raise StackError(
                    f"not ready after {options.ready_timeout_s:.0f} s: {reason}",
                    processes.files.log_tail("agent"),
                )


def _not_ready_reason(state: Mapping[str, Any]) -> str:
    """Returns what the body of /readyz reports as missing."""
    if state.get("status") == "unavailable":
        return "the database is not available"
    for agent in state.get("agents") or ():
        if agent.get("live"):
            return "agent connected, no Ray nodes yet"
    return "agent not connected yet"


def _port_file(processes: StackProcesses) -> Path:
    return Path(processes.record.temp_dir) / "service.port"


def _ray_environment(processes: StackProcesses) -> dict[str, str | None]:
    record = processes.record
    return ray_environment(record.ray_token, Path(record.temp_dir))
