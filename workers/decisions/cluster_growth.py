"""Counts the nodes that an autoscaler may still give to a cluster.

Owns: which nodes belong to a group, and how the missing ones look. Pure. Must not know:
jobs, Ray's API.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from workers.protocol.wire import NodeGroup, NodeInfo
from workers.protocol.wording import counted

NODE_GROUP_LABEL = "ray.io/node-group"
"""Ray's label of nodes that an autoscaler has made: the name of their group."""


def nodes_to_come(
    nodes: Iterable[NodeInfo], groups: Sequence[NodeGroup]
) -> tuple[NodeInfo, ...]:
    """Returns the nodes that the cluster may still be given, as they would be reported."""
    present: Counter[str | None] = Counter()
    for node in nodes:
        # One that cannot be used counts too: the autoscaler makes no other in its place.
        if node.alive:
            present[node.labels.get(NODE_GROUP_LABEL)] += 1
    to_come = []
    for group in groups:
        for index in range(present[group.name], group.max_nodes):
            to_come.append(_node_of(group, index))
    return tuple(to_come)


def group_of(node: NodeInfo) -> str:
    """Returns the name of a node's group; empty for a node of none."""
    return node.labels.get(NODE_GROUP_LABEL, "")


def describe_nodes(counts: Mapping[str, int], noun: str = "node", of: str = "of") -> str:
    """Returns numbers of nodes by group as a text such as `2 nodes of gpu-h100`."""
    parts = []
    for name, count in sorted(counts.items()):
        parts.append(f"{counted(count, noun)} {of} {name}")
    return " and ".join(parts)


def _node_of(group: NodeGroup, index: int) -> NodeInfo:
    return NodeInfo(
        # As Ray requires of ids in conditions, where it matches no node.
        node_id=f"{group.name}.new-{index + 1}",
        address=f"{group.name}/new-{index + 1}",
        cpus=group.cpus,
        gpus=group.gpus,
        accelerator_type=group.accelerator_type,
        labels={**group.labels, NODE_GROUP_LABEL: group.name},
    )
