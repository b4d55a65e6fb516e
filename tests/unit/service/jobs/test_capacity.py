"""Admission and placement count what fits by the same rule."""

from hypothesis import given
from hypothesis import strategies as st

from service.jobs.capacity import ClusterCapacity, resource_request
from service.jobs.cluster_fit import check_fit
from workers.decisions.placement import plan_placement
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo

AMOUNTS = st.floats(0, 600, allow_nan=False) | st.sampled_from([0.1, 0.3, 0.7, 8, 96])


@st.composite
def clusters(draw: st.DrawFn) -> list[NodeInfo]:
    nodes = []
    for index in range(draw(st.integers(0, 5))):
        node = NodeInfo(
            node_id=f"n{index}",
            address=f"10.0.0.{index}",
            alive=draw(st.booleans()),
            cpus=draw(AMOUNTS),
            gpus=draw(st.integers(0, 16)),
            storage_ok=draw(st.sampled_from([None, True, False])),
        )
        nodes.append(node)
    return nodes


@st.composite
def specs(draw: st.DrawFn) -> JobSpec:
    resources = {
        "accelerator": draw(st.sampled_from(["auto", "cpu", "gpu"])),
        "cpus_per_rank": draw(st.floats(0.01, 64) | st.sampled_from([0.1, 0.3, 1.0])),
    }
    return JobSpec.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "parallel": {
                "tp": draw(st.sampled_from([1, 2, 4, 8])),
                "dp": draw(st.integers(1, 8)),
            },
            "data": {"train": [{"path": "x"}]},
            "training": {"seq_length": 8, "global_batch_size": 8, "steps": 1},
            "optimizer": {"lr": 0.1},
            "resources": resources,
        }
    )


@given(clusters(), specs())
def test_what_is_admitted_can_be_placed_and_nothing_else(
    nodes: list[NodeInfo], spec: JobSpec
) -> None:
    plan = plan_placement(spec, nodes)
    capacity = ClusterCapacity(nodes)
    request = resource_request(spec, plan.dims.world_size, has_gpus=capacity.has_gpus)
    assert request.gpu == (plan.accelerator == "gpu")
    assert capacity.max_ranks(request) == plan.capacity * plan.dims.tp
    assert capacity.reserve(request) == plan.is_feasible


def test_copies_of_states_that_no_node_can_hold_are_refused() -> None:
    spec = JobSpec.from_mapping(
        {
            "model": {"preset": "gpt2-124m"},
            "parallel": {"tp": 2, "dp": 1},
            "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
            "training": {"seq_length": 8, "global_batch_size": 8, "steps": 1},
            "optimizer": {"lr": 0.1},
            "checkpoint": {"peer_every_steps": 5},
        }
    )
    small = NodeInfo(node_id="a", address="", cpus=8, memory_bytes=1 << 30)
    (problem,) = check_fit(spec, ClusterCapacity([small]))
    assert problem.pointer == "/checkpoint/peer_every_steps"
    assert "the largest node has 1 GiB" in problem.detail
    large = small.model_copy(update={"node_id": "b", "memory_bytes": 1 << 36})
    assert check_fit(spec, ClusterCapacity([small, large])) == []
    unknown = small.model_copy(update={"node_id": "c", "memory_bytes": 0})
    assert check_fit(spec, ClusterCapacity([small, unknown])) == []
