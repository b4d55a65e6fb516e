"""Reads Ray's nodes as plain values.

Owns: reading `ray.nodes()` and drains. Must not know: jobs' specs, HTTP, torch.
"""

import contextlib
import socket
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from workers.decisions.topology.node_rules import ACCELERATOR_PREFIX, domain_label
from workers.protocol.wire import NodeInfo

_CONNECT_S = 2.0
_CONNECT_THREADS = 16
_COUNTED_APART = ("CPU", "GPU", "memory", "object_store_memory")
_OF_ONE_NODE = "node:"


def read_nodes(storage_ok: Mapping[str, bool] | None = None) -> tuple[NodeInfo, ...]:
    """Returns every node of the connected cluster; needs `ray.init`.

    `storage_ok` is the result of the storage check, by node id.
    """
    deadlines = drain_deadlines()
    nodes = []
    for node in _ray_nodes():
        nodes.append(_node_info(node, storage_ok or {}, deadlines))
    return tuple(nodes)


def drain_deadlines() -> dict[str, float | None]:
    """Returns when each node that is being drained goes, by node id.

    In seconds since the epoch; None: not known. A node drains before the autoscaler, a
    preStop hook or Ray's own handler of SIGTERM ends it.
    """
    # Ray has no public call for it; its own libraries use this one. 0: no deadline.
    deadlines: dict[str, float | None] = {}
    for node_id, deadline_ms in ray._private.state.state.get_draining_nodes().items():
        deadlines[node_id] = None
        if deadline_ms:
            deadlines[node_id] = deadline_ms / 1000
    return deadlines


def read_free_nodes() -> tuple[NodeInfo, ...]:
    """Returns every node with what is not in use on it."""
    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    nodes = []
    for node in read_nodes():
        nodes.append(node.model_copy(update={"free": free.get(node.node_id)}))
    return tuple(nodes)


def unreachable_nodes(node_ids: Iterable[str]) -> tuple[str, ...]:
    """Returns those of some nodes whose Ray does not accept a connection any more.

    Ray itself lists a node as alive for up to a minute after its death.
    """
    addresses = {}
    for node in _ray_nodes():
        addresses[node["NodeID"]] = (node["NodeManagerAddress"], node["NodeManagerPort"])
    # At the same time, because each one that does not answer takes the whole limit.
    asked = tuple(node_ids)
    with ThreadPoolExecutor(max_workers=_CONNECT_THREADS) as pool:
        accepts = pool.map(_accepts, [addresses.get(node_id) for node_id in asked])
        answers = zip(asked, accepts, strict=True)
        return tuple(node_id for node_id, is_accepted in answers if not is_accepted)


def _accepts(address: tuple[str, int] | None) -> bool:
    """Whether a connection can be made; without an address it cannot."""
    if address is None:
        return False
    try:
        socket.create_connection(address, timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def own_address() -> str:
    """Returns the address at which other nodes of the cluster reach this node."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def nvlink_domain(node_id: str) -> str:
    """Returns the NVLink domain of a node; empty if the node has no label for it."""
    for node in read_nodes():
        label = domain_label([node])
        if node.node_id == node_id and label is not None:
            return node.labels[label]
    return ""


def job_folder(node_id: str, job_id: str) -> Path:
    """Returns the folder on a node that a job's ranks write to."""
    return _session_folder(node_id) / "megatron-ray" / job_id


def link_into_ray_logs(job_folder: Path) -> None:
    """Makes the ranks' files on a node readable in Ray's dashboard, below its logs."""
    jobs_folder = job_folder.parent
    # Another process of the node may have made the link; without it only links of the
    # dashboard fail.
    with contextlib.suppress(OSError):
        link = jobs_folder.with_name("logs") / jobs_folder.name
        link.symlink_to(Path("..", jobs_folder.name))


def _session_folder(node_id: str) -> Path:
    """Returns Ray's session folder on a node; it is deleted with the node's Ray."""
    for node in _ray_nodes():
        if node["NodeID"] == node_id and node.get("RayletSocketName"):
            # <session folder>/sockets/raylet
            return Path(node["RayletSocketName"]).parent.parent
    return Path(tempfile.gettempdir())


def _ray_nodes() -> list[dict[str, Any]]:
    return list(ray.nodes())  # type: ignore[no-untyped-call]


def _node_info(
    node: Mapping[str, Any],
    storage_ok: Mapping[str, bool],
    deadlines: Mapping[str, float | None],
) -> NodeInfo:
    """Returns one row of `ray.nodes()` as a value."""
    node_id = str(node["NodeID"])
    resources = node.get("Resources", {})
    labels = {str(key): str(value) for key, value in (node.get("Labels") or {}).items()}
    return NodeInfo(
        node_id=node_id,
        address=str(node["NodeManagerAddress"]),
        alive=bool(node["Alive"]),
        cpus=float(resources.get("CPU", 0)),
        gpus=float(resources.get("GPU", 0)),
        accelerator_type=_accelerator_type(resources, labels),
        resources=_other_resources(resources),
        memory_bytes=int(resources.get("memory", 0)),
        labels=labels,
        storage_ok=storage_ok.get(node_id),
        draining=node_id in deadlines,
        drain_deadline=deadlines.get(node_id),
    )


def _other_resources(resources: Mapping[str, Any]) -> dict[str, float]:
    others = {}
    for name, amount in resources.items():
        if name not in _COUNTED_APART and not name.startswith(_OF_ONE_NODE):
            others[str(name)] = float(amount)
    return others


def _accelerator_type(
    resources: Mapping[str, Any], labels: Mapping[str, str]
) -> str | None:
    # Ray exposes the type as a resource, newer versions also as a label.
    for name in resources:
        if name.startswith(ACCELERATOR_PREFIX):
            return name.removeprefix(ACCELERATOR_PREFIX)
    return labels.get("ray.io/accelerator-type")
