"""Requests of profiles on their way through the driver to the ranks, and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_cluster import (
    JOB_ID,
    DriverDies,
    FakeCluster,
    FakeControlPlane,
    FakeProcess,
    FaultInjector,
    fake_ports,
)
from workers.driver.lifecycle import JobLifecycle
from workers.protocol.states import JobState
from workers.protocol.wire import ProfileOrder


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(steps=8, save_every=4, step_s=1.0)


@pytest.fixture
def control_plane(tmp_path: Path) -> FakeControlPlane:
    spec = {
        "model": {"preset": "gpt-tiny"},
        "parallel": {"tp": 2, "dp": 1},
        "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
        "training": {"seq_length": 16, "global_batch_size": 2, "steps": 8},
        "optimizer": {"lr": 0.001},
        "storage": {"path": str(tmp_path)},
    }
    return FakeControlPlane(spec, str(tmp_path))


def run(
    control_plane: FakeControlPlane,
    cluster: FakeCluster,
    faults: FaultInjector | None = None,
) -> None:
    assert control_plane.desired is not None
    folder = control_plane.desired.job_dir
    JobLifecycle(JOB_ID, folder, fake_ports(cluster, control_plane, folder, faults)).run()


def asks(
    control_plane: FakeControlPlane,
    at_step: int,
    order: ProfileOrder,
    attempt: int | None = None,
) -> Callable[[FakeProcess], None]:
    """Returns what requests a profile once a rank has done a step.

    It is of the attempt that runs, or of another one.
    """

    def ask(process: FakeProcess) -> None:
        assert process.order is not None
        if process.step == at_step and control_plane.profile is None:
            update = {"attempt": attempt or process.order.attempt}
            control_plane.request_profile(order.model_copy(update=update))

    return ask


def order(*ranks: int) -> ProfileOrder:
    return ProfileOrder(number=1, attempt=1, first_step=5, last_step=6, ranks=ranks)


def profiles(control_plane: FakeControlPlane) -> list[dict[str, Any]]:
    return [record.data for record in control_plane.of_kind("profile")]


def test_the_ranks_that_are_named_get_a_request_once_and_all_report(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.on_step = asks(control_plane, 2, order(0, 1))
    taken: dict[int, int] = {}
    first = cluster.on_step

    def count(process: FakeProcess) -> None:
        first(process)
        taken[process.slot] = len(process.profiles)

    cluster.on_step = count
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    assert taken == {0: 1, 1: 1}
    reports = profiles(control_plane)
    assert sorted(report["rank"] for report in reports) == [0, 1]
    assert {(report["number"], report["folder"]) for report in reports} == {(1, "/p")}


def test_a_rank_that_is_not_there_or_does_not_answer_is_reported(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.answers = False
    cluster.on_step = asks(control_plane, 2, order(1, 7))
    run(control_plane, cluster)
    problems = {report["rank"]: report["problem"] for report in profiles(control_plane)}
    assert problems == {
        1: "it has not answered within 3 s, or has ended",
        7: "the attempt has 2 ranks, numbered from 0",
    }


def test_a_request_of_another_attempt_is_left_alone(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.on_step = asks(control_plane, 2, order(0), attempt=2)
    run(control_plane, cluster)
    assert profiles(control_plane) == []


def test_a_driver_that_dies_at_any_act_loses_no_profile(
    control_plane: FakeControlPlane, cluster: FakeCluster, tmp_path: Path
) -> None:
    counted = FaultInjector()
    cluster.on_step = asks(control_plane, 2, order(0, 1))
    run(control_plane, cluster, counted)
    spec = control_plane.desired.spec if control_plane.desired else {}
    for at in range(1, counted.acts + 1, 3):
        folder = tmp_path / str(at)
        folder.mkdir()
        own_spec = {**spec, "storage": {"path": str(folder)}}
        plane = FakeControlPlane(own_spec, str(folder))
        again = FakeCluster(steps=8, save_every=4, step_s=1.0)
        again.on_step = asks(plane, 2, order(0, 1))
        try:
            run(plane, again, FaultInjector(at))
        except DriverDies:
            run(plane, again)
        assert sorted(report["rank"] for report in profiles(plane)) == [0, 1], at
