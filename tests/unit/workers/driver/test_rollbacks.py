"""A rule ends an attempt: the driver rolls the job back, moves it, or ends it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.checkpoint.directory import list_checkpoints, rollbacks_of
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
from workers.protocol.wire import NodeInfo
from workers.rank.messages import RankState, RecheckOrder, StartRequest

BAD = 7
NODES = tuple(
    NodeInfo(node_id=name, address=f"192.0.2.{index}", cpus=2)
    for index, name in enumerate(("first", "second"))
)


class Job:
    """Two ranks that save every second step, and break a rule at one step."""

    def __init__(self, folder: Path, **checkpoint: int) -> None:
        self.folder = folder
        spec = {
            "model": {"preset": "gpt-tiny"},
            "parallel": {"tp": 2, "dp": 1},
            "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
            "training": {"seq_length": 16, "global_batch_size": 2, "steps": 10},
            "checkpoint": {"every_steps": 2, "keep_last": 2} | checkpoint,
            "optimizer": {"lr": 0.001},
            "storage": {"path": str(folder)},
            "restart": {"backoff_s": 0},
        }
        self.cluster = FakeCluster(steps=10, save_every=2)
        self.cluster.on_step = self._on_step
        self.control_plane = FakeControlPlane(spec, str(folder))
        self.error: dict[str, Any] = rollback(max_step=5)
        self.is_broken: Callable[[StartRequest], bool] = lambda order: (
            BAD not in order.left_out
        )
        self.orders: dict[int, StartRequest] = {}
        self.acts: list[int] = []
        """Acts of the driver until each time that a rank came to that step."""

    def _on_step(self, process: FakeProcess) -> None:
        assert process.order is not None
        self.orders[process.order.attempt] = process.order
        if process.step == BAD:
            self.acts.append(self.faults.acts)
        if process.step == BAD and self.is_broken(process.order):
            process.error = self.error
            process.state = RankState.FAILED

    def run(self, die_at: int = 0) -> None:
        folder = str(self.folder)
        self.faults = FaultInjector(die_at)
        ports = fake_ports(self.cluster, self.control_plane, folder, self.faults)
        JobLifecycle(JOB_ID, folder, ports).run()

    def begins(self) -> list[str]:
        """From where each attempt started."""
        rows = self.control_plane.of_kind("attempt")
        return [row.data["message"] for row in rows if row.data["state"] == "starting"]

    def decision(self) -> dict[str, Any]:
        (event,) = self.control_plane.events("policy.decision")
        return event.data

    def checkpoints(self) -> list[tuple[int, int]]:
        infos = list_checkpoints(str(self.folder))
        return [(info.step, info.attempt) for info in infos if info.committed]


def rollback(max_step: int) -> dict[str, Any]:
    facts = {"step": BAD, "leave_out": 1, "max_step": max_step}
    return {
        "type": "RollbackError",
        "message": "the loss of step 7 is 1e+05",
        "failure_kind": "rollback",
        "facts": facts,
        "step": BAD,
    }


def test_a_job_is_rolled_back_and_leaves_the_samples_out(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.run()
    assert job.control_plane.state is JobState.SUCCEEDED
    assert job.begins() == ["from step 0", "from checkpoint step 4"]
    assert job.orders[2].left_out == (BAD,)
    assert job.decision()["message"] == (
        "restarting from step 4: rank 0: the loss of step 7 is 1e+05"
    )
    assert job.decision()["data"]["failures"] == 0, "not the budget of failures"
    (event,) = job.control_plane.events("job.rolled_back")
    assert event.data["data"] == {"step": BAD, "left_out": [BAD], "max_step": 5}
    (recorded,) = rollbacks_of(str(tmp_path))
    assert list(recorded.left_out) == [BAD]
    # The one of step 6 that was left behind is neither used, counted nor deleted.
    assert job.checkpoints() == [(6, 1), (8, 2), (10, 2)]


def test_a_failure_after_a_rollback_does_not_bring_back_what_was_left_behind(
    tmp_path: Path,
) -> None:
    job = Job(tmp_path)
    is_broken = job.is_broken

    def broken_or_dead(order: StartRequest) -> bool:
        if order.attempt == 2:
            job.cluster.workers.pop(1, None)
        return is_broken(order)

    job.is_broken = broken_or_dead
    job.run()
    assert job.begins()[1:] == ["from checkpoint step 4", "from checkpoint step 6"]
    assert job.orders[3].left_out == (BAD,)
    assert job.orders[3].resume_from is not None
    assert job.orders[3].resume_from.endswith("step-00000006-a0002")


def test_copies_in_memory_are_used_if_they_are_old_enough(tmp_path: Path) -> None:
    job = Job(tmp_path, peer_every_steps=3, every_steps=2)
    job.cluster.save_every = 10
    job.error = rollback(max_step=5)
    job.run()
    assert job.begins() == ["from step 0", "from peer copies of step 3"]
    assert job.orders[2].left_out == (BAD,)


@pytest.mark.parametrize(
    ("max_step", "max_rollbacks", "words"),
    [
        (1, 3, "but not no checkpoint is of step 1 or before, the oldest is of step 4"),
        (5, 0, "but not after the 0 rollbacks of training.max_rollbacks"),
    ],
)
def test_a_rollback_that_is_refused_ends_the_job(
    tmp_path: Path, max_step: int, max_rollbacks: int, words: str
) -> None:
    job = Job(tmp_path)
    desired = job.control_plane.desired
    assert desired is not None
    desired.spec["training"]["max_rollbacks"] = max_rollbacks
    job.error = rollback(max_step)
    job.run()
    assert job.control_plane.state is JobState.FAILED
    assert words in job.decision()["message"]
    assert job.decision()["data"]["reason"] == "training_rule"
    assert rollbacks_of(str(tmp_path)) == (), "so that its checkpoints can be resumed from"


def test_a_rule_that_stops_ends_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.error = {"type": "RuleStopError", "message": "m", "failure_kind": "rule"}
    job.run()
    assert job.control_plane.state is JobState.FAILED
    assert job.decision()["message"] == (
        "not restarting: rank 0: m (not restarted: the error is deterministic)"
    )


def all_acts(tmp_path: Path, change: Callable[[Job], None]) -> Iterator[tuple[str, Job]]:
    """Runs a job for each act of its driver from the bad step on, until it is passed."""
    (tmp_path / "0").mkdir()
    unharmed = Job(tmp_path / "0")
    change(unharmed)
    unharmed.run()
    for die_at in range(min(unharmed.acts), max(unharmed.acts) + 3):
        folder = tmp_path / str(die_at)
        folder.mkdir()
        job = Job(folder)
        change(job)
        with pytest.raises(DriverDies):
            job.run(die_at)
        job.run()
        yield f"died at act {die_at}", job
    assert max(unharmed.acts) - min(unharmed.acts) > 15, "acts to die at"


def test_the_driver_dies_at_any_act_of_a_rollback(tmp_path: Path) -> None:
    for where, job in all_acts(tmp_path, lambda job: None):
        assert job.control_plane.state is JobState.SUCCEEDED, where
        assert job.control_plane.ignored == [], where
        assert sorted(job.control_plane.steps) == list(range(1, 11)), where
        last = job.orders[max(job.orders)]
        assert last.left_out == (BAD,), where
        (recorded,) = rollbacks_of(str(job.folder))
        assert (6, recorded.attempt) in job.checkpoints(), f"{where}: left behind, and kept"
        assert job.cluster.workers == {}, where


def move(job: Job, *, is_cured: bool) -> None:
    """The second rank computes a step wrongly, on its node or on both."""
    job.cluster.nodes = NODES
    job.error = {
        "type": "RecheckError",
        "message": "the loss of step 7 is nan",
        "failure_kind": "recheck",
        "facts": {"step": BAD, "rank": 1},
        "step": BAD,
    }

    def is_broken(order: StartRequest) -> bool:
        return order.recheck is not None and order.recheck.step is None

    job.is_broken = is_broken
    if is_cured:
        inner = job.cluster.on_step

        def report(process: FakeProcess) -> None:
            inner(process)
            assert process.order is not None
            if process.step == BAD and not is_broken(process.order):
                data = {"step": BAD, "verdict": "persistent", "message": "m", "suspect": 1}
                process.report("training_rule", data)

        job.cluster.on_step = report


def test_a_step_is_computed_again_on_other_nodes_and_the_bad_one_excluded(
    tmp_path: Path,
) -> None:
    job = Job(tmp_path)
    move(job, is_cured=True)
    job.run()
    assert job.control_plane.state is JobState.SUCCEEDED
    assert job.orders[1].recheck == RecheckOrder()
    assert job.orders[2].recheck == RecheckOrder(BAD, 1, has_moved=True)
    assert job.decision()["data"]["failures"] == 0
    (excluded,) = job.control_plane.events("node.excluded")
    assert excluded.data["message"].endswith(
        "step 7, computed there twice, broke a rule that it keeps elsewhere"
    )


def test_a_cluster_without_another_node_computes_it_in_place(tmp_path: Path) -> None:
    job = Job(tmp_path)
    move(job, is_cured=False)
    job.cluster.nodes = (NODES[0].model_copy(update={"cpus": 4}),)
    job.run()
    assert job.control_plane.state is JobState.SUCCEEDED
    assert job.orders[2].recheck == RecheckOrder(BAD, 1, has_moved=False)
    assert job.control_plane.events("node.excluded") == []


def test_the_driver_dies_at_any_act_of_a_move(tmp_path: Path) -> None:
    for where, job in all_acts(tmp_path, lambda job: move(job, is_cured=True)):
        assert job.control_plane.state is JobState.SUCCEEDED, where
        excluded = job.control_plane.events("node.excluded")
        assert {event.data["data"]["node_id"] for event in excluded} == {"first"}, where
