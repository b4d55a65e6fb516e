"""A job whose node is about to go saves, stops and starts again on another node."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_cluster import (
    JOB_ID,
    NODE,
    DriverDies,
    FakeCluster,
    FakeControlPlane,
    FakeProcess,
    FaultInjector,
    fake_ports,
)
from workers.driver.lifecycle import JobLifecycle
from workers.protocol.states import DesiredState, JobState

OTHER = NODE.model_copy(update={"node_id": "other", "address": "127.0.0.2"})


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(steps=9, save_every=4, nodes=(NODE, OTHER))


@pytest.fixture
def control_plane(tmp_path: Path) -> FakeControlPlane:
    spec = {
        "model": {"preset": "gpt-tiny"},
        "parallel": {"tp": 2, "dp": 1},
        "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
        "training": {"seq_length": 16, "global_batch_size": 2, "steps": 9},
        "optimizer": {"lr": 0.001},
        "storage": {"path": str(tmp_path)},
        "restart": {"max_failures": 0},
    }
    return FakeControlPlane(spec, str(tmp_path))


def run(
    control_plane: FakeControlPlane,
    cluster: FakeCluster,
    faults: FaultInjector | None = None,
    **changes: Any,
) -> None:
    assert control_plane.desired is not None
    folder = control_plane.desired.job_dir
    ports = fake_ports(cluster, control_plane, folder, faults)
    JobLifecycle(JOB_ID, folder, replace(ports, **changes)).run()


def drain_at(cluster: FakeCluster, step: int, deadline_s: float | None) -> None:
    """Has the first node drained once rank 0 has done a step."""

    def on_step(process: FakeProcess) -> None:
        assert process.order is not None
        if process.step == step and cluster.node_of(0) is NODE:
            deadline = None
            if deadline_s is not None:
                deadline = cluster.clock() + deadline_s
            cluster.drains[NODE.node_id] = deadline

    cluster.on_step = on_step


def attempts(control_plane: FakeControlPlane) -> list[tuple[str, str | None, str]]:
    """Returns state, reason and message of each end or start of an attempt."""
    rows = []
    for record in control_plane.of_kind("attempt"):
        data = record.data
        if data["state"] != "running":
            rows.append((data["state"], data["reason"], data["message"]))
    return rows


@pytest.mark.parametrize("deadline_s", [None, 60.0])
def test_the_ranks_save_at_the_next_step_and_go_on_elsewhere(
    control_plane: FakeControlPlane, cluster: FakeCluster, deadline_s: float | None
) -> None:
    drain_at(cluster, 5, deadline_s)
    run(control_plane, cluster)
    # Not a failure of the job, whose budget of failures is 0.
    assert control_plane.state is JobState.SUCCEEDED
    assert cluster.node_of(0) is OTHER
    (event,) = control_plane.events("node.draining")
    when = "soon"
    if deadline_s is not None:
        when = "in 60 s"
    assert event.data["message"] == (
        f"node 127.0.0.1 is about to go ({when}): the ranks save a checkpoint after this step "
        "and start again elsewhere"
    )
    assert event.data["ranks"] == [0, 1]
    assert event.data["data"]["nodes"] == {"node": "127.0.0.1"}
    # The step after the notice is the one that was saved.
    assert attempts(control_plane) == [
        ("starting", None, "from step 0"),
        ("failed", "preempted", "node 127.0.0.1 is being drained"),
        ("starting", None, "from checkpoint step 6"),
        ("succeeded", None, ""),
    ]
    (decision,) = control_plane.events("policy.decision")
    assert decision.data["data"]["preemptions"] == 1
    assert decision.data["data"]["failures"] == 0


def test_ranks_that_do_not_stop_in_time_are_ended_before_the_node_goes(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    drain_at(cluster, 5, 3.1)
    cluster.stops = False
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    assert attempts(control_plane)[1:3] == [
        (
            "failed",
            "preempted",
            "node 127.0.0.1 is being drained, and its ranks did not save a checkpoint in time",
        ),
        ("starting", None, "from checkpoint step 4"),
    ]


def test_a_rank_that_dies_with_its_node_is_a_preemption(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    drain_at(cluster, 5, 60.0)
    cluster.dies = (1, 6)
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    _, reason, message = attempts(control_plane)[1]
    assert reason == "preempted"
    assert message.startswith("rank 1: node 127.0.0.1 is being drained: its process died")


def test_a_driver_that_dies_meanwhile_loses_nothing(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    drain_at(cluster, 5, None)
    for at in range(1, 1000):
        faults = FaultInjector(at)
        try:
            run(control_plane, cluster, faults)
            break
        except DriverDies:
            continue
    assert control_plane.state is JobState.SUCCEEDED
    assert control_plane.ignored == []
    assert sorted(control_plane.steps) == list(range(1, 10))


def test_a_cancelled_job_is_cancelled_while_its_node_drains(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    def on_step(process: FakeProcess) -> None:
        if process.step == 5:
            cluster.drains[NODE.node_id] = None
        if process.step == 6:
            control_plane.desire(DesiredState.CANCEL)

    cluster.on_step = on_step
    run(control_plane, cluster)
    assert control_plane.state is JobState.CANCELLED
    assert sorted(control_plane.steps) == list(range(1, 7))


def test_a_node_without_ranks_may_go(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.drains[OTHER.node_id] = None
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    assert control_plane.events("node.draining") == []
    assert len(control_plane.events("policy.decision")) == 0
