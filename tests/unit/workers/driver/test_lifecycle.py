"""A job from its first data task to its last actor, when its dependencies fail."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.storage import Storage
from tests.support.fake_cluster import (
    JOB_ID,
    FakeCluster,
    FakeControlPlane,
    FakeStorage,
    FakeTasks,
    FaultInjector,
    fake_ports,
)
from workers.driver.lifecycle import JobLifecycle
from workers.protocol.states import JobState
from workers.ray.tasks import TaskFailedError


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(steps=4, save_every=2)


@pytest.fixture
def control_plane(tmp_path: Path) -> FakeControlPlane:
    spec = {
        "model": {"preset": "gpt-tiny"},
        "parallel": {"tp": 2, "dp": 1},
        "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
        "training": {"seq_length": 16, "global_batch_size": 2, "steps": 4},
        "optimizer": {"lr": 0.001},
        "storage": {"path": str(tmp_path)},
    }
    return FakeControlPlane(spec, str(tmp_path))


def run(control_plane: FakeControlPlane, cluster: FakeCluster, **changes: Any) -> None:
    assert control_plane.desired is not None
    folder = control_plane.desired.job_dir
    ports = replace(fake_ports(cluster, control_plane, folder), **changes)
    JobLifecycle(JOB_ID, folder, ports).run()


def final_state(control_plane: FakeControlPlane) -> dict[str, Any]:
    return control_plane.of_kind("state")[-1].data


class FullStorage(FakeStorage):
    """A disk that is full whenever the marker of a checkpoint is written."""

    def write_bytes_atomic(self, name: str, data: bytes) -> None:
        if name == "COMMITTED":
            raise StorageError("write", name, "No space left on device")
        super().write_bytes_atomic(name, data)


def full_at_step_4(path: str) -> Storage:
    if "step-00000004" in path:
        return FullStorage(path, FaultInjector())
    return FakeStorage(path, FaultInjector())


def test_a_job_whose_last_checkpoint_cannot_be_committed_has_not_succeeded(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    run(control_plane, cluster, open_storage=full_at_step_4)
    failures = control_plane.events("attempt.failed")
    assert failures
    for failure in failures:
        assert failure.data["data"]["kind"] == "storage"
        assert "the checkpoint of step 4 cannot be committed" in failure.data["message"]
    assert control_plane.state is JobState.FAILED
    assert final_state(control_plane)["reason"] in ("no_progress", "budget_spent")
    assert cluster.workers == {}


class FailingTasks(FakeTasks):
    def __init__(self, result: dict[str, Any] | None) -> None:
        self._result = result

    def result(self, call: None) -> dict[str, Any]:
        if self._result is None:
            raise TaskFailedError("OSError: no memory")
        return self._result


def test_data_that_cannot_be_prepared_end_the_job(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    run(control_plane, cluster, tasks=FailingTasks(None))
    state = final_state(control_plane)
    assert (state["state"], state["reason"]) == ("failed", "internal")
    assert state["message"] == "preparing the data failed: OSError: no memory"
    assert not cluster.is_placed


def test_data_of_no_use_are_reported_as_problems_and_nothing_else(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    problem = {"pointer": "/data/train/0/path", "code": "missing", "detail": "not there"}
    run(control_plane, cluster, tasks=FailingTasks({"problems": [problem]}))
    (record,) = control_plane.of_kind("problem")
    assert record.data == {"problems": [problem]}
    assert final_state(control_plane)["state"] == "preparing"


def test_an_unharmed_job_goes_through_its_states_in_order(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    run(control_plane, cluster)
    states = [record.data["state"] for record in control_plane.of_kind("state")]
    assert states == ["preparing", "scheduling", "starting", "running", "succeeded"]
    attempts = [record.data["state"] for record in control_plane.of_kind("attempt")]
    assert attempts == ["starting", "running", "succeeded"]
    first = control_plane.of_kind("attempt")[0]
    assert first.data["message"] == "from step 0"
    assert control_plane.ignored == []
