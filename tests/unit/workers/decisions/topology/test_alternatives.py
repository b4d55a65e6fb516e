"""The nearest layout that fits, in the words of a refusal."""

import pytest

from workers.decisions.topology.alternatives import missing_room, nearest_layout
from workers.decisions.topology.room import Demand
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo


def spec(parallel: dict[str, object], batch: int = 64) -> JobSpec:
    return JobSpec.from_mapping(
        {
            "model": {"preset": "gpt2-355m"},
            "parallel": parallel,
            "data": {"train": [{"path": "x"}]},
            "training": {"seq_length": 64, "global_batch_size": batch, "steps": 1},
            "optimizer": {"lr": 0.1},
        }
    )


def cluster(*gpus: int) -> list[NodeInfo]:
    nodes = []
    for index, count in enumerate(gpus):
        nodes.append(
            NodeInfo(node_id=str(index), address=f"10.0.0.{index}", cpus=64, gpus=count)
        )
    return nodes


def demand(tp: int, **custom: float) -> Demand:
    return Demand({"CPU": 1.0, "GPU": 1.0, **custom}, tp)


LAYOUTS = [
    # Smaller tp, and as many ranks as before.
    ({"tp": 8, "dp": 2}, cluster(4, 4, 4, 4), "tp=4, dp=4"),
    ({"tp": 8, "dp": 2}, cluster(4, 4), "tp=4"),
    ({"tp": 8, "dp": 1}, cluster(4, 4), "tp=4, dp=2"),
    # Fewer ranks.
    ({"tp": 4, "dp": 4}, cluster(8), "dp=2"),
    ({"tp": 2, "pp": 4, "dp": 1}, cluster(4), "pp=2"),
    # `auto` adapts itself.
    ({"tp": 8}, cluster(4, 4), "tp=4"),
    ({"tp": 2}, [], None),
]


@pytest.mark.parametrize(("parallel", "nodes", "layout"), LAYOUTS)
def test_the_nearest_layout_is_named(
    parallel: dict[str, object], nodes: list[NodeInfo], layout: str | None
) -> None:
    asked = spec(parallel)
    assert nearest_layout(asked, nodes, demand(asked.parallel.tp)) == layout


def test_what_is_refused_for_other_reasons_is_not_named() -> None:
    asked = spec({"tp": 8, "dp": 2})
    nodes = cluster(4, 4, 4, 4)

    def is_allowed(candidate: JobSpec) -> bool:
        return candidate.parallel.pp > 1

    # A longer pipeline keeps the weights of a rank as many as they were.
    assert nearest_layout(asked, nodes, demand(8), is_allowed) == "tp=4, pp=2"
    # A batch that three replicas cannot share.
    assert nearest_layout(spec({"dp": 4}, batch=4), cluster(3), demand(1)) == "dp=2"


def test_the_missing_resource_is_named() -> None:
    nodes = cluster(4, 2)
    assert missing_room(nodes, demand(8)) == "needs 8 GPUs on one node, the largest has 4"
    assert missing_room(nodes, Demand({"CPU": 32}, 4)) == (
        "needs 128 CPUs on one node, the largest has 64"
    )
    assert missing_room(nodes, demand(1, rdma=1)) == (
        "needs 1 rdma on one node, the largest has 0"
    )
    mixed = [
        NodeInfo(node_id="a", address="a", cpus=2, gpus=8),
        NodeInfo(node_id="b", address="b", cpus=64),
    ]
    assert missing_room(mixed, demand(4)) == (
        "needs 4 GPUs + 4 CPUs on one node, and none has them together"
    )
