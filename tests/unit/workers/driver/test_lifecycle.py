"""A job from its first data task to its last actor, when its dependencies fail."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.storage.errors import DiskFullError, StorageError
from megatron_ray.storage.storage import Storage
from tests.support.fake_cluster import (
    JOB_ID,
    FakeCluster,
    FakeControlPlane,
    FakeProcess,
    FakeStorage,
    FakeTasks,
    FaultInjector,
    fake_ports,
)
from workers.driver.lifecycle import JobLifecycle
from workers.protocol.states import DesiredState, JobState
from workers.rank.messages import RankState
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
    """A disk that refuses the marker of every checkpoint."""

    error: type[StorageError] = StorageError

    def write_bytes_atomic(self, name: str, data: bytes) -> None:
        if name == "COMMITTED":
            raise self.error("write", name, "No space left on device")
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
    assert not cluster.num_bundles


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


def test_a_job_that_reaches_a_limit_of_its_spec_has_succeeded_and_goes_on_when_resumed(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.exit_every = 3
    assert control_plane.desired is not None
    spec = dict(control_plane.desired.spec)
    spec["training"] = {**spec["training"], "exit_every_steps": 3}
    control_plane.change(spec)
    control_plane.desire(DesiredState.PREPARE)
    run(control_plane, cluster)
    ending = final_state(control_plane)
    assert (ending["state"], ending["reason"]) == ("succeeded", "planned_exit")
    assert ending["message"] == (
        "ended after step 3 by training.exit_every_steps; `megatron-ray resume job-f` goes on "
        "from its checkpoint"
    )
    attempts = [record.data["state"] for record in control_plane.of_kind("attempt")]
    assert attempts == ["starting", "running", "succeeded"]
    assert max(committed(control_plane)) == 3
    control_plane.resume()
    run(control_plane, cluster)
    assert final_state(control_plane)["reason"] is None
    assert max(committed(control_plane)) == 4


def committed(control_plane: FakeControlPlane) -> dict[int, Path]:
    """The folders of the checkpoints that were committed, by step."""
    rows = control_plane.of_kind("checkpoint")
    return {row.data["step"]: Path(row.data["path"]) for row in rows}


def test_a_damaged_checkpoint_is_recorded_and_an_older_one_resumes_the_job(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.steps = 8
    cluster.dies = (1, 6)

    def damage() -> float:
        (committed(control_plane)[4] / "index.json").unlink()
        return 0.0

    # Asked for when the attempt has failed, before the next one is prepared.
    run(control_plane, cluster, jitter=damage)
    assert control_plane.state is JobState.SUCCEEDED
    (event,) = control_plane.events("checkpoint.damaged")
    message = event.data["message"]
    assert "step-00000004-a0001: its file index.json is missing" in message
    starts = [row.data["message"] for row in control_plane.of_kind("attempt")]
    assert "from checkpoint step 2" in starts
    folder = committed(control_plane)[4].with_name("step-00000004-a0001")
    assert folder.is_dir(), "a user may restore it"


def test_a_job_whose_checkpoints_are_all_damaged_does_not_begin_anew(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.dies = (1, 4)

    def damage() -> float:
        (committed(control_plane)[2] / "manifest.json").write_text("")
        return 0.0

    run(control_plane, cluster, jitter=damage)
    assert control_plane.state is JobState.FAILED
    ending = final_state(control_plane)
    assert ending["reason"] == "storage_error"
    assert "none of its committed checkpoints is whole" in ending["message"]
    assert "step-00000002-a0001: manifest.json is missing" in ending["message"]


def test_a_job_whose_checkpoints_were_deleted_does_not_begin_anew(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.dies = (1, 4)

    def delete() -> float:
        shutil.rmtree(committed(control_plane)[2].parent)
        return 0.0

    run(control_plane, cluster, jitter=delete)
    assert control_plane.state is JobState.FAILED
    ending = final_state(control_plane)
    assert ending["reason"] == "storage_error"
    assert ending["message"].startswith(
        "the checkpoint of step 2 was committed, and none is"
    )
    assert "restore it and resume the job, or submit the spec as a new" in ending["message"]


@pytest.mark.parametrize(
    ("data", "num_prepared"), [({}, 1), ({"shuffle": False}, 2), ({"cache": "/c"}, 2)]
)
def test_a_resumed_job_prepares_its_data_again_only_if_they_are_others(
    control_plane: FakeControlPlane,
    cluster: FakeCluster,
    data: dict[str, Any],
    num_prepared: int,
) -> None:
    run(control_plane, cluster)
    assert control_plane.desired is not None
    spec = control_plane.desired.spec
    control_plane.change(
        spec | {"data": spec["data"] | data, "training": spec["training"] | {"steps": 8}}
    )
    control_plane.resume()
    cluster.steps = 8
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    assert sorted(control_plane.steps) == list(range(1, 9))
    assert len(control_plane.of_kind("prepared")) == num_prepared
    states = [record.data["state"] for record in control_plane.of_kind("state")]
    assert states.count("preparing") == num_prepared
    assert control_plane.ignored == []


def test_bytes_that_a_rank_reads_as_damaged_lead_to_an_older_checkpoint(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.steps = 8
    cluster.dies = (1, 6)

    def refuse(process: FakeProcess) -> None:
        order = process.order
        assert order is not None
        if (order.resume_from or "").endswith("step-00000004-a0001"):
            process.state = RankState.FAILED
            process.error = {
                "type": "DamagedCheckpointError",
                "message": f"cannot load {order.resume_from}: other bytes",
                "failure_kind": "checkpoint",
            }

    cluster.on_step = refuse
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    starts = [row.data["message"] for row in control_plane.of_kind("attempt")]
    assert "from checkpoint step 4" in starts
    assert "from checkpoint step 2" in starts
    (event,) = control_plane.events("checkpoint.damaged")
    assert "step-00000004-a0001: cannot load" in event.data["message"]
    decisions = [row.data["message"] for row in control_plane.events("policy.decision")]
    assert decisions[0].startswith("restarting from step 4: ")
    assert decisions[1].startswith("restarting from an older checkpoint: ")


def test_a_full_disk_is_one_failure_with_its_remedy(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    def full(path: str) -> Storage:
        storage = full_at_step_4(path)
        if isinstance(storage, FullStorage):
            storage.error = DiskFullError
        return storage

    run(control_plane, cluster, open_storage=full)
    assert len(control_plane.events("attempt.failed")) == 1
    ending = final_state(control_plane)
    assert (ending["state"], ending["reason"]) == ("failed", "storage_error")
    assert "free some space there, or lower checkpoint.keep_last" in ending["message"]


def test_a_commit_that_the_storage_refuses_for_a_while_costs_no_attempt(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    num_refused = 0

    def refusing(path: str) -> Storage:
        nonlocal num_refused
        if "step-00000002" in path and num_refused < 3:
            num_refused += 1
            return FullStorage(path, FaultInjector())
        return FakeStorage(path, FaultInjector())

    run(control_plane, cluster, open_storage=refusing)
    assert control_plane.state is JobState.SUCCEEDED
    assert control_plane.events("attempt.failed") == []
    (event,) = control_plane.events("checkpoint.delayed")
    assert event.data["level"] == "warn"
    assert event.data["message"] == (
        "the checkpoint of step 2 is not committed yet, it is tried again: cannot write "
        "COMMITTED: No space left on device"
    )
    committed = [
        record.data["step"]
        for record in control_plane.of_kind("checkpoint")
        if record.data["action"] == "committed"
    ]
    assert committed == [2, 4]


def test_a_part_that_a_rank_could_not_write_is_an_event_and_training_goes_on(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    def on_step(process: FakeProcess) -> None:
        if process.step == 2 and process.slot == 1:
            data = {"step": 2, "path": "x", "cause": "cannot write x: Input/output error"}
            process.report("checkpoint_failed", data)

    cluster.on_step = on_step
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    (event,) = control_plane.events("rank.checkpoint_failed")
    assert event.data["ranks"] == [1]
    assert event.data["message"] == (
        "rank 1 could not write its part of the checkpoint of step 2, and training goes on: "
        "cannot write x: Input/output error"
    )


class Outage(FakeTasks):
    """Data that cannot be read at first."""

    def __init__(self, num_failures: int) -> None:
        self.num_left = num_failures

    def result(self, call: None) -> dict[str, Any]:
        if self.num_left:
            self.num_left -= 1
            return {"storage": "cannot read /data/x: Input/output error"}
        return super().result(call)


def test_data_that_cannot_be_read_for_a_while_are_prepared_later(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    run(control_plane, cluster, tasks=Outage(3))
    assert control_plane.state is JobState.SUCCEEDED
    (event,) = control_plane.events("data.delayed")
    assert event.data["message"] == (
        "the data are not prepared yet, it is tried again: cannot read /data/x: Input/output "
        "error"
    )


def test_data_that_can_never_be_read_end_the_job_with_the_reason(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    run(control_plane, cluster, tasks=Outage(1 << 30))
    state = final_state(control_plane)
    assert (state["state"], state["reason"]) == ("failed", "storage_error")
    assert state["message"] == (
        "preparing the data failed: cannot read /data/x: Input/output error"
    )


def test_a_rank_that_does_not_write_its_part_is_an_event(
    control_plane: FakeControlPlane, cluster: FakeCluster
) -> None:
    cluster.save_every = 3
    cluster.steps = 8

    def on_step(process: FakeProcess) -> None:
        # Rank 1 writes its part of step 3 long after rank 0.
        if process.step == 2 and process.slot == 1:
            process.late_turns = 400

    cluster.on_step = on_step
    run(control_plane, cluster)
    assert control_plane.state is JobState.SUCCEEDED
    # The fake ranks do not wait for each other, so later steps are late too: once each.
    event = control_plane.events("storage.slow")[0]
    assert event.data["level"] == "warn"
    assert event.data["message"] == (
        "the storage is slow: 60 s after other ranks, these have not written their part of "
        "the checkpoint of step 3: 1"
    )
    assert len(control_plane.events("storage.slow")) == 3
