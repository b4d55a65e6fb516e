"""Builds the command line and the environment of a local Ray head.

Owns: its ports, its temp dir, its token. Never imports ray.

Ray listens on all interfaces, whatever address it is given. Token authentication is
therefore always on, and the token travels in the environment only.
"""

import contextlib
import math
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

# A Unix socket path has at most 107 bytes; Ray appends about 65 to its temp dir.
MAX_TEMP_DIR_LENGTH = 40

# All of Ray's ports: with its defaults, two stacks on one machine would collide.
_PORT_OPTIONS = {
    "ray_gcs": "--port",
    "ray_node_manager": "--node-manager-port",
    "ray_object_manager": "--object-manager-port",
    "ray_client": "--ray-client-server-port",
    "ray_dashboard": "--dashboard-port",
    "ray_dashboard_agent_grpc": "--dashboard-agent-grpc-port",
    "ray_dashboard_agent_http": "--dashboard-agent-listen-port",
    "ray_metrics": "--metrics-export-port",
    "ray_runtime_env_agent": "--runtime-env-agent-port",
}
PORT_NAMES: tuple[str, ...] = tuple(_PORT_OPTIONS)

# Training never puts tensors into the object store; Ray's default is a third of the
# machine's memory.
_OBJECT_STORE_BYTES = 256 << 20


def free_ports(names: Sequence[str]) -> dict[str, int]:
    """Returns one port per name that was free on all interfaces a moment ago."""
    ports: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        # All sockets stay bound until the last port is chosen, so no port comes twice.
        for name in names:
            bound = stack.enter_context(socket.socket())
            bound.bind(("", 0))
            ports[name] = bound.getsockname()[1]
    return ports


def is_free(port: int) -> bool:
    """Returns whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        # As servers do: connections in TIME_WAIT do not make a port busy.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def head_command(ports: dict[str, int], temp_dir: Path, num_cpus: int) -> list[str]:
    """Returns the `ray start --head` command line.

    Ray stays in the foreground, so its process leads the session while Ray lives.
    """
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        "--disable-usage-stats",
        f"--temp-dir={temp_dir}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        f"--num-cpus={num_cpus}",
    ]
    for name, option in _PORT_OPTIONS.items():
        command.append(f"{option}={ports[name]}")
    return command


def available_cpus(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Returns the cores this process may use within its affinity and container quota.

    At least 2, so that a two-rank job fits on any machine.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = quota_file.read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no cgroup, or its quota is "max"
    return max(2, cores)


def may_raise_priority() -> bool:
    """Returns whether this user's processes may take back a priority they gave up."""
    raised = threading.Event()

    def lower_and_raise() -> None:
        # The first call fails too where this process already runs at a lower priority.
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 1)
            os.setpriority(os.PRIO_PROCESS, 0, 0)
            raised.set()

    # Linux keeps priorities per thread: a thread that cannot raise its own again
    # takes the loss with it when it ends.
    trial = threading.Thread(target=lower_and_raise)
    trial.start()
    trial.join()
    return raised.is_set()


def ray_environment(token: str, temp_dir: Path) -> dict[str, str | None]:
    """Returns the variables of every process that starts or joins this Ray cluster.

    None stands for a variable to remove.
    """
    worker_niceness = "0"
    if may_raise_priority():
        # Ray's default: starting processes, data preparation and standby processes
        # yield to the ranks, which raise their own priority where they may.
        worker_niceness = "15"
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        # An idle task process is kept for a minute even while ranks occupy all CPUs;
        # with Ray's default of a second, every spec check would start with two seconds
        # of imports.
        "RAY_idle_worker_killing_time_threshold_ms": "60000",
        "RAY_worker_niceness": worker_niceness,
        # Ranks keep their memory (megatron_ray.distributed.device.MallocTuning). These
        # two can only be set before a process starts: a Ray worker has many arenas
        # before a rank could limit them to one, and cached scraps of aligned blocks
        # would keep those blocks from being merged and reused.
        "MALLOC_ARENA_MAX": "1",
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
        # An inherited address of another cluster would be used instead of this one's.
        "RAY_ADDRESS": None,
        # Killed processes leave sockets behind; here they go with the temp dir.
        "TMPDIR": str(temp_dir),
    }
