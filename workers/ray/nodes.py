"""Ray's nodes as plain values.

Owns: reading `ray.nodes()`. Must not know: jobs, HTTP, torch.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from workers.protocol.wire import NodeInfo

DOMAIN_LABELS = ("ray.io/gpu-domain", "nvidia.com/gpu.clique")
"""Node labels that name an NVLink domain larger than a node."""
NODE_ID_LABEL = "ray.io/node-id"


def read_nodes(storage_ok: Mapping[str, bool] | None = None) -> tuple[NodeInfo, ...]:
    """Every node of the connected cluster; needs `ray.init`.

    `storage_ok`: what the storage check found, by node id.
    """
    return tuple(node_info(node, storage_ok or {}) for node in ray_nodes())


def ray_nodes() -> list[dict[str, Any]]:
    """Ray's own rows."""
    return list(ray.nodes())  # type: ignore[no-untyped-call]


def own_address() -> str:
    """Address of this node, as Ray's other nodes reach it."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def node_info(node: Mapping[str, Any], storage_ok: Mapping[str, bool]) -> NodeInfo:
    """One row of `ray.nodes()` as a value."""
    resources = node.get("Resources", {})
    labels = {str(key): str(value) for key, value in (node.get("Labels") or {}).items()}
    types = [
        name.removeprefix("accelerator_type:")
        for name in resources
        if name.startswith("accelerator_type:")
    ]
    return NodeInfo(
        node_id=str(node["NodeID"]),
        address=str(node["NodeManagerAddress"]),
        alive=bool(node["Alive"]),
        cpus=float(resources.get("CPU", 0)),
        gpus=float(resources.get("GPU", 0)),
        accelerator_type=types[0] if types else labels.get("ray.io/accelerator-type"),
        memory_bytes=int(resources.get("memory", 0)),
        labels=labels,
        storage_ok=storage_ok.get(str(node["NodeID"])),
    )


def domain_of(node: NodeInfo) -> str:
    """NVLink domain of a node; empty where no label says."""
    return next((node.labels[label] for label in DOMAIN_LABELS if label in node.labels), "")


def session_folder(node_id: str) -> Path:
    """Ray's session folder on a node: what is written there goes when the node's Ray
    does.
    """
    for node in ray_nodes():
        if node["NodeID"] == node_id and node.get("RayletSocketName"):
            return Path(node["RayletSocketName"]).parent.parent
    return Path(tempfile.gettempdir())


def job_folder(node_id: str, job_id: str) -> Path:
    """Where a job's ranks write on a node, whoever asks."""
    return session_folder(node_id) / "megatron-ray" / job_id
