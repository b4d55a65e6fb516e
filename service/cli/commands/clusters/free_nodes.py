"""Chooses the nodes that can be measured now, and the job that measures them.

Owns: which nodes are free, how many ranks each gets. Pure. Must not know: how a service is
called, what is measured.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

Json = Mapping[str, Any]
_MAX_CPUS_PER_GPU = 1.0


@dataclass(frozen=True)
class FreeNode:
    """A node on which ranks may start, and what jobs leave of it."""

    node_id: str
    address: str
    cpus: float
    gpus: int


@dataclass(frozen=True)
class NodeChoice:
    """The nodes to measure, and why the others are not measured."""

    nodes: tuple[FreeNode, ...]
    left_out: tuple[tuple[str, str], ...]
    """Addresses with reasons."""

    @property
    def uses_gpus(self) -> bool:
        """Whether GPUs are measured, and not CPUs."""
        return self.num_gpus > 0

    @property
    def num_gpus(self) -> int:
        """Number of free GPUs of all nodes."""
        return sum(map(attrgetter("gpus"), self.nodes))

    def reasons(self) -> str:
        """Returns why nodes are not measured, in one line."""
        return ", ".join(f"{address} ({reason})" for address, reason in self.left_out)


def choose_nodes(
    cluster: Json, usage: Mapping[str, tuple[float, int]], names: Sequence[str] = ()
) -> NodeChoice:
    """Returns the nodes of a cluster that can be measured now.

    `usage` are CPUs and GPUs that jobs use, by node id; `names` are addresses or starts of
    ids, none: all nodes. In a cluster with GPUs, only their nodes are measured.
    """
    free = []
    left_out = []
    alive = [node for node in cluster["nodes"] if node["alive"]]
    has_gpus = sum(map(itemgetter("gpus"), alive)) > 0
    for node in alive:
        if names and not _is_named(node, names):
            continue
        cpus, gpus = usage.get(node["node_id"], (0.0, 0))
        candidate = FreeNode(
            node["node_id"],
            node["address"],
            node["cpus"] - cpus,
            int(node["gpus"]) - gpus,
        )
        reason = _refusal(node, candidate, has_gpus=has_gpus)
        if reason is None:
            free.append(candidate)
        elif reason:
            left_out.append((node["address"], reason))
    return NodeChoice(tuple(free), tuple(left_out))


def unknown_names(cluster: Json, names: Iterable[str]) -> list[str]:
    """Returns the names that are those of no living node."""
    unknown = []
    for name in names:
        if not any(node["alive"] and _is_named(node, [name]) for node in cluster["nodes"]):
            unknown.append(name)
    return unknown


def check_spec(choice: NodeChoice, cluster: str, min_ratio: float) -> dict[str, Any]:
    """Returns the spec of a job that measures all chosen nodes.

    Each GPU gets a rank. On CPU each node gets one; larger nodes get several, so that all
    ranks have equally many cores.
    """
    nodes = choice.nodes
    num_ranks = 0
    if choice.uses_gpus:
        accelerator = "gpu"
        precision = "bf16"
        num_ranks = choice.num_gpus
        cpus_per_rank = _MAX_CPUS_PER_GPU
        for node in nodes:
            cpus_per_rank = min(cpus_per_rank, max(0.0001, node.cpus / node.gpus))
    else:
        accelerator = "cpu"
        precision = "fp32"
        cpus_per_rank = min(map(attrgetter("cpus"), nodes)) // 1
        for node in nodes:
            num_ranks += int(node.cpus // cpus_per_rank)
    resources = {
        "accelerator": accelerator,
        "cpus_per_rank": round(cpus_per_rank, 4),
        "nodes": {"only": list(map(attrgetter("node_id"), nodes))},
    }
    return {
        "name": "cluster-check",
        "cluster": cluster,
        "model": {"preset": "gpt-tiny"},
        "parallel": {"dp": num_ranks},
        "data": {
            "train": [{"path": "builtin://python-stdlib"}],
            "tokenizer": {"kind": "bytes"},
        },
        "training": {
            "seq_length": 16,
            "micro_batch_size": 1,
            "global_batch_size": num_ranks,
            "steps": 1,
            "precision": precision,
        },
        "optimizer": {"lr": 0.001},
        "resources": resources,
        "restart": {"max_failures": 0},
        "preflight": {"mode": "only", "min_ratio": min_ratio},
    }


def _refusal(node: Json, free: FreeNode, *, has_gpus: bool) -> str | None:
    """Returns why a node is not measured; empty for one that never has ranks."""
    if node.get("excluded"):
        return "excluded"
    if node.get("draining"):
        return "draining"
    if node.get("storage_ok") is False:
        return "cannot read the storage"
    if has_gpus and not node["gpus"]:
        return ""
    if not has_gpus and node["cpus"] < 1:
        return ""
    is_busy = free.cpus < 1
    if has_gpus:
        is_busy = free.gpus < 1
    if is_busy:
        return "in use"
    return None


def _is_named(node: Json, names: Sequence[str]) -> bool:
    return node["address"] in names or node["node_id"].startswith(tuple(names))
