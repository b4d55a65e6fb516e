"""A Ray cluster whose autoscaler makes nodes: processes of this machine.

Owns: the head, its autoscaler's config, and the end of all of it. Ray's own
`AutoscalingCluster` ends every Ray cluster of the machine, and reads a file that Ray's
wheel does not contain.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.exceptions import RayError

from service.local_stack.ray_head import PORT_NAMES, free_ports, head_command
from workers.agent.agent import probe_port
from workers.decisions.cluster_growth import NODE_GROUP_LABEL
from workers.protocol.wire import NodeGroup

_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_EMPTY_LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_filter",
    "rsync_exclude",
)
_END_S = 10.0
_TRIES = 3
_OBJECT_STORE_BYTES = 80_000_000


@contextlib.contextmanager
def autoscaling_cluster(
    group: NodeGroup, namespace: str, idle_s: float = 3.0
) -> Iterator[str]:
    """Connects to a head without CPUs, whose autoscaler makes a group's nodes.

    Yields its address. Nodes that are idle for `idle_s` are removed.
    """
    for _ in range(_TRIES):
        head = _Head(group, idle_s)
        if head.connect(namespace):
            break
        head.end()
    try:
        yield head.address
    finally:
        ray.shutdown()
        head.end()


class _Head:
    """The head's process, in a session and a folder of its own."""

    def __init__(self, group: NodeGroup, idle_s: float) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mr-", dir="/tmp"))
        ports = free_ports(PORT_NAMES)
        self.address = f"127.0.0.1:{ports['ray_gcs']}"
        config = self._folder / "autoscaler.json"
        config.write_text(json.dumps(_autoscaler_config(self.address, group, idle_s)))
        command = [
            *head_command(ports, self._folder, 0),
            "--num-gpus=0",
            f"--autoscaling-config={config}",
        ]
        with open(self._folder / "head.log", "wb") as log:
            self._process = subprocess.Popen(
                command,
                env=_environment(self._folder),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def connect(self, namespace: str) -> bool:
        """Connects this process; false when the head has ended.

        On a busy machine Ray gives its start up after 30 s.
        """
        while self._process.poll() is None:
            try:
                probe_port(self.address)
                ray.init(address=self.address, namespace=namespace, log_to_driver=False)
            except (OSError, RuntimeError, RayError):
                ray.shutdown()
                time.sleep(0.2)
            else:
                return True
        return False

    def end(self) -> None:
        """Ends the head, and the nodes, which survive the autoscaler that made them."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline and _kill_below(self._folder):
            time.sleep(0.1)
        shutil.rmtree(self._folder, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "TMPDIR": str(folder),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        # The provider's name of the head, by which the autoscaler leaves it alone.
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    environment.pop("RAY_ADDRESS", None)
    return environment


def _autoscaler_config(address: str, group: NodeGroup, idle_s: float) -> dict[str, Any]:
    resources = {
        "CPU": group.cpus,
        "GPU": group.gpus,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    return {
        "cluster_name": "test",
        "max_workers": group.max_nodes,
        # Not the provider's short name, whose defaults are in a file that is missing.
        "provider": {
            "type": "external",
            "module": _PROVIDER,
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {
            "ray.head.default": {
                "resources": {"CPU": 0},
                "node_config": {},
                "max_workers": 0,
            },
            group.name: {
                "resources": resources,
                "labels": {NODE_GROUP_LABEL: group.name},
                "node_config": {},
                "min_workers": 0,
                "max_workers": group.max_nodes,
            },
        },
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 1.0,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        **{name: [] for name in _EMPTY_LISTS},
        "file_mounts_sync_continuously": False,
    }


def _kill_below(folder: Path) -> bool:
    """Kills every process whose command line names the folder; returns whether any did."""
    is_any = False
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if str(folder).encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
                is_any = True
    return is_any
