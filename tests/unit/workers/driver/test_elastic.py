"""An elastic job that loses nodes, gets them back, and is resized by hand."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_cluster import (
    JOB_ID,
    NODE,
    NOTICED_S,
    DriverDies,
    FakeCluster,
    FakeControlPlane,
    FakeProcess,
    FaultInjector,
    fake_ports,
)
from workers.driver.lifecycle import JobLifecycle
from workers.protocol.states import DesiredState, JobState

STEPS = 200
LOST_AT = 5
MAX_ACTS = 400
NODES = tuple(
    NODE.model_copy(
        update={"node_id": f"node-{number}", "address": f"127.0.0.{number + 1}"}
    )
    for number in range(4)
)


def cluster_of(**fields: Any) -> FakeCluster:
    return FakeCluster(steps=STEPS, save_every=10, nodes=NODES, step_s=5.0, **fields)


def control_plane_at(folder: Path, tp: int = 2, dp: int = 4) -> FakeControlPlane:
    spec = {
        "model": {"preset": "gpt-tiny"},
        "parallel": {"tp": tp, "dp": dp},
        "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
        "training": {
            "seq_length": 16,
            "micro_batch_size": 1,
            "global_batch_size": 12,
            "steps": STEPS,
        },
        "optimizer": {"lr": 0.001},
        "storage": {"path": str(folder)},
        "elastic": {"min_dp": 1, "max_dp": 6},
        "restart": {"standby": False},
    }
    return FakeControlPlane(spec, str(folder))


@pytest.fixture
def control_plane(tmp_path: Path) -> FakeControlPlane:
    return control_plane_at(tmp_path)


def run(
    control_plane: FakeControlPlane,
    cluster: FakeCluster,
    faults: FaultInjector | None = None,
) -> None:
    assert control_plane.desired is not None
    folder = control_plane.desired.job_dir
    JobLifecycle(JOB_ID, folder, fake_ports(cluster, control_plane, folder, faults)).run()


def sizes(control_plane: FakeControlPlane) -> list[int]:
    """Ranks of each attempt that ran."""
    return [
        record.data["world_size"]
        for record in control_plane.of_kind("attempt")
        if record.data["state"] == "running"
    ]


def lose_a_node(
    cluster: FakeCluster, *, until: int | None = None, survivors: int = 0
) -> None:
    """Node 2 is lost at one step, and back at a later one."""
    is_lost = False

    def on_step(process: FakeProcess) -> None:
        nonlocal is_lost
        if process.step == LOST_AT and not is_lost:
            is_lost = True
            cluster.lose("node-2", survivors=survivors)
        if process.step == until:
            cluster.lost.clear()

    cluster.on_step = on_step


def resize_at(
    cluster: FakeCluster, control_plane: FakeControlPlane, sizes_by_step: dict[int, int]
) -> None:
    """A user asks for other sizes at some steps."""

    def on_step(process: FakeProcess) -> None:
        assert process.order is not None
        if process.order.env.rank == 0 and process.step in sizes_by_step:
            control_plane.resize(sizes_by_step.pop(process.step))

    cluster.on_step = on_step


def test_a_job_that_loses_a_node_goes_on_at_once_with_fewer_replicas(
    control_plane: FakeControlPlane,
) -> None:
    cluster = cluster_of()
    lose_a_node(cluster)
    # Ray has not noticed, and would let the replacements wait for the dead node.
    began = cluster.clock.now
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    # 12 samples over 3 replicas are as legal as over 4.
    assert sizes(control_plane) == [8, 6]
    (event,) = control_plane.events("job.shrunk")
    assert event.data["message"] == "goes on with dp=3 instead of 4, without the lost nodes"
    assert cluster.clock.now - began < STEPS * cluster.step_s + 2 * NOTICED_S
    assert cluster.workers == {}
    assert not cluster.num_bundles


def test_a_process_that_outlives_its_node_for_a_moment_is_not_used_again(
    control_plane: FakeControlPlane,
) -> None:
    cluster = cluster_of()
    lose_a_node(cluster, survivors=1)
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    assert sizes(control_plane) == [8, 6]
    assert len(control_plane.events("attempt.failed")) == 1


def test_a_shrunk_job_grows_back_when_its_node_has_returned(
    control_plane: FakeControlPlane,
) -> None:
    cluster = cluster_of()
    lose_a_node(cluster, until=40)
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    assert sizes(control_plane) == [8, 6, 8]
    (event,) = control_plane.events("job.grown")
    assert event.data["message"] == "back from dp=3 to dp=4"
    # It stopped at a checkpoint, so no step was done twice.
    assert set(control_plane.steps) == set(range(1, STEPS + 1))
    (stopped,) = [
        record.data["message"]
        for record in control_plane.of_kind("attempt")
        if record.data["state"] == "stopped"
    ]
    assert stopped.startswith(
        "stopped at a checkpoint to resize from dp=3 to dp=4: saves up to "
    )


def test_a_job_near_its_end_does_not_grow_because_a_restart_costs_more(
    control_plane: FakeControlPlane,
) -> None:
    cluster = cluster_of()
    lose_a_node(cluster, until=STEPS - 1)
    run(control_plane, cluster)
    assert sizes(control_plane) == [8, 6]


def test_a_job_that_may_not_shrink_waits_for_its_node(
    control_plane: FakeControlPlane,
) -> None:
    assert control_plane.desired is not None
    control_plane.change({**control_plane.desired.spec, "elastic": None})
    control_plane.desire(DesiredState.PREPARE)
    cluster = cluster_of()
    lose_a_node(cluster)
    run(control_plane, cluster)
    assert sizes(control_plane) == [8, 8]


def test_a_job_is_resized_by_hand_down_and_up(control_plane: FakeControlPlane) -> None:
    cluster = cluster_of()
    resize_at(cluster, control_plane, {20: 2, 60: 6})
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    assert sizes(control_plane) == [8, 4, 12]
    messages = [event.data["message"] for event in control_plane.events("job.resized")]
    assert messages == ["from dp=4 to dp=2", "from dp=2 to dp=6"]
    assert cluster.workers == {}


def run_again(control_plane: FakeControlPlane, cluster: FakeCluster, die_at: int) -> bool:
    """Returns whether the first driver lived to the end; the second one is immortal."""
    try:
        run(control_plane, cluster, FaultInjector(die_at))
    except DriverDies:
        run(control_plane, cluster)
        return False
    return True


@pytest.mark.parametrize("change", ["loss", "resize"])
def test_a_driver_may_die_anywhere_while_the_size_changes(
    tmp_path: Path, change: str
) -> None:
    for die_at in range(1, MAX_ACTS):
        folder = tmp_path / str(die_at)
        folder.mkdir()
        control_plane = control_plane_at(folder, tp=1, dp=3)
        cluster = FakeCluster(steps=8, save_every=4, nodes=NODES, step_s=1.0)
        if change == "loss":
            lose_a_node(cluster)
        else:
            resize_at(cluster, control_plane, {5: 2})
        is_unharmed = run_again(control_plane, cluster, die_at)
        where = f"died at act {die_at}"
        assert control_plane.state is JobState.SUCCEEDED, where
        assert control_plane.ignored == [], where
        assert set(control_plane.steps) == set(range(1, 9)), where
        assert sizes(control_plane)[-1] == 2, where
        assert cluster.workers == {}, where
        assert not cluster.num_bundles, where
        if is_unharmed:
            return
    raise AssertionError(f"the job takes more than {MAX_ACTS} acts")
