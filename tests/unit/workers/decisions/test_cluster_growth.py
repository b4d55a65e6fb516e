"""Which nodes an autoscaler may still give to a cluster."""

from workers.decisions.cluster_growth import (
    NODE_GROUP_LABEL,
    describe_nodes,
    group_of,
    nodes_to_come,
)
from workers.decisions.placement import plan_placement
from workers.protocol.job import JobSpec
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


def spec(**resources: object) -> JobSpec:
    return JobSpec.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "parallel": {"tp": 8, "dp": 2, "sequence_parallel": True},
            "data": {"train": [{"path": "x"}]},
            "training": {"seq_length": 8, "global_batch_size": 8, "steps": 1},
            "optimizer": {"lr": 0.1},
            "resources": {"accelerator": "gpu", **resources},
        }
    )


def test_a_placement_is_planned_on_nodes_to_come() -> None:
    nodes = (node("head"),)
    assert not plan_placement(spec(), nodes).is_feasible
    plan = plan_placement(spec(), (*nodes, *nodes_to_come(nodes, [GROUP])))
    assert plan.is_feasible
    assert len(plan.bundles) == 2
    # No condition that a node which is not there yet could not meet.
    assert plan.bundles[0].resources == {"CPU": 8.0, "GPU": 8.0}
    assert dict(plan.bundles[0].selector) == {}


def test_what_the_autoscaler_must_know_of_a_node_is_a_label() -> None:
    nodes = nodes_to_come((), [GROUP])
    plan = plan_placement(spec(gpu_type="H100"), nodes)
    assert plan.is_feasible
    assert plan.bundles[0].resources == {"CPU": 8.0, "GPU": 8.0}
    assert dict(plan.bundles[0].selector) == {"ray.io/accelerator-type": "H100"}
    plan = plan_placement(spec(nodes={"only": ["pool=h100"]}), nodes)
    assert plan.is_feasible
    assert dict(plan.bundles[0].selector) == {"pool": "in(h100)"}
    assert not plan_placement(spec(gpu_type="A100"), nodes).is_feasible
