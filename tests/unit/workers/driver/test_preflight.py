"""A job measures its nodes before it trains, and leaves bad ones out."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_cluster import (
    JOB_ID,
    NODE,
    DriverDies,
    FakeCluster,
    FakeControlPlane,
    FaultInjector,
    fake_ports,
)
from workers.driver.lifecycle import JobLifecycle
from workers.protocol.states import JobState
from workers.protocol.wire import Record

NODES = tuple(
    NODE.model_copy(update={"node_id": f"node-{letter}", "address": f"192.0.2.{number}"})
    for number, letter in enumerate("abc", start=1)
)


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(steps=4, save_every=2, step_s=1.0, nodes=NODES)


def control_plane_of(folder: Path, **preflight: Any) -> FakeControlPlane:
    spec = {
        "model": {"preset": "gpt-tiny"},
        "parallel": {"tp": 1, "dp": 3},
        "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
        "training": {"seq_length": 16, "global_batch_size": 3, "steps": 4},
        "optimizer": {"lr": 0.001},
        "storage": {"path": str(folder)},
        "preflight": {"mode": "before_training", **preflight},
    }
    return FakeControlPlane(spec, str(folder))


def run(
    control_plane: FakeControlPlane,
    cluster: FakeCluster,
    faults: FaultInjector | None = None,
) -> None:
    assert control_plane.desired is not None
    folder = control_plane.desired.job_dir
    ports = fake_ports(cluster, control_plane, folder, faults)
    JobLifecycle(JOB_ID, folder, ports).run()


def only(records: list[Record]) -> dict[str, Any]:
    (record,) = records
    return record.data


def entry(folder: Path, attempt: int) -> dict[str, Any]:
    text = (folder / "attempts" / f"{attempt:04d}.json").read_text()
    values: dict[str, Any] = json.loads(text)
    return values


def test_equal_nodes_pass_and_are_not_measured_again(
    tmp_path: Path, cluster: FakeCluster
) -> None:
    control_plane = control_plane_of(tmp_path)
    cluster.dies = (1, 3)
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    event = only(control_plane.events("preflight.passed"))
    assert event["level"] == "info"
    assert event["message"] == (
        "pre-flight passed on 3 nodes: matmul 1.00 TFLOP/s, memory 1.00 GB/s, links 1.00 GB/s, "
        "all-reduce of all 1.00 GB/s at least"
    )
    assert len(event["data"]["nodes"]) == 3
    assert entry(tmp_path, 2)["measured_nodes"] == ["node-a", "node-b", "node-c"]


def test_a_slow_node_is_excluded_and_costs_no_restart(
    tmp_path: Path, cluster: FakeCluster
) -> None:
    control_plane = control_plane_of(tmp_path)
    cluster.flops = {"node-b": 2e11}
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    reason = "matmul 200 GFLOP/s, median of its peers 1.00 TFLOP/s"
    failed = only(control_plane.events("preflight.failed"))
    assert failed["message"] == f"pre-flight: node 192.0.2.2: {reason}"
    excluded = only(control_plane.events("node.excluded"))
    assert excluded["data"] == {
        "node_id": "node-b",
        "address": "192.0.2.2",
        "reason": f"pre-flight: {reason}",
    }
    assert {node.node_id for node in cluster.homes} == {"node-a", "node-c"}
    assert only(control_plane.events("policy.decision"))["data"]["failures"] == 0
    assert entry(tmp_path, 2)["failures"] == 0
    # The nodes of the second attempt are measured too.
    assert len(control_plane.events("preflight.passed")) == 1


def test_a_job_that_fits_on_no_other_nodes_waits_for_them(
    tmp_path: Path, cluster: FakeCluster
) -> None:
    control_plane = control_plane_of(tmp_path)
    cluster.flops = {"node-b": 2e11}
    cluster.nodes = tuple(node.model_copy(update={"cpus": 1}) for node in NODES)
    faults = FaultInjector()
    ports = fake_ports(cluster, control_plane, str(tmp_path), faults)
    lifecycle = JobLifecycle(JOB_ID, str(tmp_path), ports)
    # The fake cluster places what does not fit; the real one does not.
    plans = []

    class Waiting:
        def wait(self, timeout_s: float) -> bool:
            cluster.clock.advance(timeout_s)
            if cluster.clock.now > 1300:
                raise DriverDies
            return False

    place = ports.group.placement_group

    def placement_group(plan: Any) -> Any:
        plans.append(plan)
        return place(plan) if plan.is_feasible else Waiting()

    ports.group.placement_group = placement_group  # type: ignore[method-assign]
    with pytest.raises(DriverDies):
        lifecycle.run()
    assert not plans[-1].is_feasible
    waiting = control_plane.events("placement.waiting")[-1].data["message"]
    assert "192.0.2.2" in waiting
    assert "pre-flight: matmul 200 GFLOP/s" in waiting


def test_a_job_that_only_measures_needs_no_data_and_ends(
    tmp_path: Path, cluster: FakeCluster
) -> None:
    control_plane = control_plane_of(tmp_path, mode="only")
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    assert only(control_plane.of_kind("prepared"))["num_train_tokens"] == 0
    assert control_plane.steps == {}
    only(control_plane.events("preflight.passed"))


def test_a_job_that_only_measures_fails_with_its_bad_nodes_and_excludes_none(
    tmp_path: Path, cluster: FakeCluster
) -> None:
    control_plane = control_plane_of(tmp_path, mode="only")
    cluster.flops = {"node-c": 2e11}
    run(control_plane, cluster)
    assert control_plane.state is JobState.FAILED
    last = control_plane.of_kind("state")[-1].data
    assert last["reason"] == "bad_nodes"
    assert last["message"].startswith("pre-flight: node 192.0.2.3: matmul 200 GFLOP/s")
    assert control_plane.events("node.excluded") == []
    assert only(control_plane.events("preflight.failed"))["data"]["bad"][0]["node_id"] == (
        "node-c"
    )


def test_a_node_that_measures_nothing_is_named_after_the_limit(
    tmp_path: Path, cluster: FakeCluster
) -> None:
    control_plane = control_plane_of(tmp_path, timeout_s=20.0)
    cluster.stuck_rank = 1

    def unstick(data: dict[str, Any]) -> None:
        cluster.stuck_rank = None

    take = control_plane.take

    def take_and_unstick(record: Record) -> None:
        if record.kind == "event" and record.data["type"] == "preflight.failed":
            unstick(record.data)
        take(record)

    control_plane.take = take_and_unstick  # type: ignore[method-assign]
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    failed = only(control_plane.events("preflight.failed"))
    assert failed["message"] == (
        "pre-flight: node 192.0.2.2: products and copies did not end within 20 s"
    )
    assert "node-b" not in {node.node_id for node in cluster.homes}


def test_a_driver_that_dies_during_the_measurements_ends_with_the_same_verdict(
    tmp_path: Path, cluster: FakeCluster
) -> None:
    control_plane = control_plane_of(tmp_path)
    cluster.flops = {"node-b": 2e11}
    with pytest.raises(DriverDies):
        run(control_plane, cluster, FaultInjector(at=30))
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    assert entry(tmp_path, 2)["failures"] == 0
    assert "node-b" not in {node.node_id for node in cluster.homes}
