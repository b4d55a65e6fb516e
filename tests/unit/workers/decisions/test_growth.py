"""Which nodes an autoscaler may still give to a cluster."""

from workers.decisions.growth import (
    NODE_GROUP_LABEL,
    describe_nodes,
    group_of,
    nodes_to_come,
)
from workers.protocol.wire import NodeGroup, NodeInfo

GROUP = NodeGroup(
    name="gpu-h100",
    max_nodes=3,
    cpus=96,
    gpus=8,
    accelerator_type="H100",
    labels={"pool": "h100"},
)


def node(name: str, group: str | None = None, **more: object) -> NodeInfo:
    labels = {} if group is None else {NODE_GROUP_LABEL: group}
    return NodeInfo.model_validate(
        {"node_id": name, "address": name, "labels": labels, **more}
    )


def test_what_is_there_counts_against_the_bound() -> None:
    nodes = [
        node("head"),
        node("a", "gpu-h100"),
        node("b", "gpu-h100", alive=False),
        node("c", "other"),
    ]
    assert len(nodes_to_come(nodes, [GROUP])) == 2
    assert not nodes_to_come([node(str(i), "gpu-h100") for i in range(4)], [GROUP])
    assert nodes_to_come(nodes, []) == ()


def test_a_node_that_cannot_be_used_takes_its_place_all_the_same() -> None:
    nodes = [node("a", "gpu-h100", storage_ok=False)]
    assert len(nodes_to_come(nodes, [GROUP])) == 2


def test_a_node_to_come_looks_like_one_that_is_there() -> None:
    first, second, _ = nodes_to_come([], [GROUP])
    assert first.node_id != second.node_id
    assert (first.cpus, first.gpus, first.accelerator_type) == (96, 8, "H100")
    assert first.labels == {"pool": "h100", NODE_GROUP_LABEL: "gpu-h100"}
    assert group_of(first) == "gpu-h100"
    assert group_of(node("head")) == ""


def test_numbers_of_nodes_read_well() -> None:
    assert describe_nodes({"gpu-h100": 2}) == "2 nodes of gpu-h100"
    assert describe_nodes({"gpu": 1, "cpu": 3}) == "3 nodes of cpu and 1 node of gpu"
