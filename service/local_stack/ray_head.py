"""Command line and environment of a local Ray head.

Owns: its ports, its temp dir, its token. Never imports ray.

Ray's ports are open on all interfaces whatever address it is given, hence token mode,
always, with the token in the environment only.
"""

import contextlib
import math
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

# Unix socket paths end at 107 bytes; Ray puts about 65 behind its temp dir.
MAX_TEMP_DIR_LENGTH = 40

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

_OBJECT_STORE_BYTES = (
    256 << 20
)  # training never puts tensors there; Ray's default would be a third of the machine


def free_ports(names: Sequence[str]) -> dict[str, int]:
    """One port per name, free on all interfaces a moment ago, picked by the kernel; all
    held at once, so all differ.
    """
    sockets = [socket.socket() for _ in names]
    try:
        for held in sockets:
            held.bind(("", 0))
        return {
            name: held.getsockname()[1] for name, held in zip(names, sockets, strict=True)
        }
    finally:
        for held in sockets:
            held.close()


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def head_command(ports: dict[str, int], temp_dir: Path, num_cpus: int) -> list[str]:
    """`ray start --head`, staying in the foreground so that its process leads the
    session for as long as Ray lives.
    """
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
    ]
    command += [
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        "--disable-usage-stats",
        f"--temp-dir={temp_dir}",
    ]
    command += [f"--object-store-memory={_OBJECT_STORE_BYTES}"]
    command += [f"--num-cpus={num_cpus}"]
    return command + [f"{option}={ports[name]}" for name, option in _PORT_OPTIONS.items()]


def available_cpus(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use, a container's quota included; at least 2, so
    that a two-rank job fits on any machine.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = quota_file.read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no quota
    return max(2, cores)


def may_raise_priority() -> bool:
    """Whether processes of this user may take back a priority they gave away.

    Tried by a thread, which ends with what it has lost.
    """
    found = []

    def lower_and_raise() -> None:
        with contextlib.suppress(
            PermissionError
        ):  # of the first already where this process runs at a lower priority
            os.setpriority(os.PRIO_PROCESS, 0, 1)
            os.setpriority(os.PRIO_PROCESS, 0, 0)
            found.append(True)

    trial = threading.Thread(target=lower_and_raise)
    trial.start()
    trial.join()
    return bool(found)


def ray_environment(token: str, temp_dir: Path) -> dict[str, str | None]:
    """What every process that starts or joins this Ray needs."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        # A process that has run a task waits a minute for another one even while ranks
        # have all CPUs; Ray would end it after a second, and each check of a spec would
        # begin with two seconds of imports.
        "RAY_idle_worker_killing_time_threshold_ms": "60000",
        # Ray's default: what starts, prepares data or stands by lets the ranks go
        # first, which raise themselves where they may.
        "RAY_worker_niceness": "15" if may_raise_priority() else "0",
        # A rank keeps its memory (megatron_ray.distributed.device.MallocTuning); what
        # can no longer be set in a living process is set here. a Ray worker has many
        # arenas before a rank can say that it keeps its memory in one
        "MALLOC_ARENA_MAX": "1",
        # else scraps of aligned blocks keep those from being joined and used again
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
        "RAY_ADDRESS": None,  # another cluster's address would be taken for this one's
        "TMPDIR": str(
            temp_dir
        ),  # killed processes leave sockets behind; here they go with the temp dir
    }
