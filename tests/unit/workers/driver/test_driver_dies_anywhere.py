"""A driver that dies before or after any of its acts: the next one finishes the job,
and the history is as if no driver had died.
"""

from collections.abc import Callable, Iterator
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
from workers.driver.attempt.spares import CHECK_INTERVAL_S
from workers.driver.context import JobContext
from workers.driver.journal import Journal
from workers.driver.lifecycle import JobLifecycle
from workers.protocol.states import DesiredState, JobState

MAX_ACTS = 400


class FakeJob:
    """One job, its cluster and its control plane; drivers come and go."""

    def __init__(
        self, folder: Path, *, dies: tuple[int, int] | None = (1, 5), step_s: float = 0.0
    ) -> None:
        self.folder = folder
        spec = {
            "model": {"preset": "gpt-tiny"},
            "parallel": {"tp": 2, "dp": 1},
            "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
            "training": {"seq_length": 16, "global_batch_size": 2, "steps": 8},
            "checkpoint": {"every_steps": 2, "keep_last": 2},
            "optimizer": {"lr": 0.001},
            "storage": {"path": str(folder)},
            "restart": {"backoff_s": 0},
        }
        self.cluster = FakeCluster(steps=8, save_every=2, dies=dies, step_s=step_s)
        self.control_plane = FakeControlPlane(spec, str(folder))
        self.fetched: set[tuple[int, int]] = set()
        self.after_death: Callable[[], None] = lambda: None

    def run_driver(self, faults: FaultInjector) -> None:
        """Runs one incarnation, to the job's end or its own."""
        folder = str(self.folder)
        ports = fake_ports(self.cluster, self.control_plane, folder, faults, self.fetched)
        JobLifecycle(JOB_ID, folder, ports).run()

    def run_to_the_end(self, die_at: int) -> bool:
        """Returns whether the first driver lived to see it; later ones are immortal."""
        try:
            self.run_driver(FaultInjector(die_at))
        except DriverDies:
            self.after_death()
            self.run_driver(FaultInjector())
            return False
        return True

    def assert_nothing_left(self) -> None:
        assert self.cluster.workers == {}
        assert not self.cluster.num_bundles
        assert self.control_plane.ignored == []


def jobs(
    tmp_path: Path, change: Callable[[FakeJob], None] = lambda job: None, **options: Any
) -> Iterator[tuple[int, FakeJob]]:
    """Runs a job for each act of its driver that may be the last one."""
    for die_at in range(1, MAX_ACTS):
        folder = tmp_path / str(die_at)
        folder.mkdir()
        job = FakeJob(folder, **options)
        change(job)
        is_unharmed = job.run_to_the_end(die_at)
        yield die_at, job
        if is_unharmed:
            return
    raise AssertionError(f"the job takes more than {MAX_ACTS} acts")


def checkpoint_paths(job: FakeJob, action: str) -> list[str]:
    paths = []
    for record in job.control_plane.of_kind("checkpoint"):
        if record.data["action"] == action:
            paths.append(record.data["path"])
    return paths


def assert_checkpoints(job: FakeJob, where: str) -> None:
    committed = checkpoint_paths(job, "committed")
    assert len(set(committed)) == len(committed), f"{where}: recorded twice"
    steps = {int(path.rpartition("step-")[2].split("-")[0]) for path in committed}
    assert steps == {2, 4, 6, 8}, where
    present = {str(path.parent) for path in job.folder.glob("checkpoints/*/COMMITTED")}
    listed = set(committed) - set(checkpoint_paths(job, "deleted"))
    assert listed == present, f"{where}: what is listed is what is there"


def attempt_states(job: FakeJob) -> dict[int, str]:
    """The last recorded state of each attempt."""
    states = {}
    for record in job.control_plane.of_kind("attempt"):
        states[record.attempt] = record.data["state"]
    return states


def assert_one_failure(job: FakeJob, where: str) -> None:
    latest = Journal(job_storage(job)).latest()
    assert latest is not None
    assert latest.failures == 1, f"{where}: one failure is one failure"
    failed = []
    for record in job.control_plane.of_kind("attempt"):
        if record.data["state"] == "failed":
            failed.append(record.attempt)
    assert len(failed) == 1, where
    assert job.fetched == {(failed[0], 1)}, f"{where}: a dead rank's files"
    states = list(attempt_states(job).values())
    assert set(states) <= {"succeeded", "failed", "stopped"}, (
        f"{where}: an attempt was left open"
    )
    assert states.count("failed") == 1, where
    decisions = job.control_plane.events("policy.decision")
    assert any(record.data["data"]["retry"] for record in decisions), where


def job_storage(job: FakeJob) -> Any:
    ports = fake_ports(job.cluster, job.control_plane, str(job.folder))
    return ports.open_storage(str(job.folder))


@pytest.mark.parametrize("has_spares", [False, True])
def test_a_job_with_a_failure_in_it(tmp_path: Path, has_spares: bool) -> None:
    count = 0
    promoted: list[int] = []
    step_s = 0.0
    if has_spares:
        step_s = CHECK_INTERVAL_S
    for die_at, job in jobs(tmp_path, step_s=step_s):
        where = f"died at act {die_at}"
        job.assert_nothing_left()
        control_plane = job.control_plane
        assert control_plane.state is JobState.SUCCEEDED, where
        assert sorted(control_plane.steps) == list(range(1, 9)), where
        assert_checkpoints(job, where)
        assert_one_failure(job, where)
        states = [record.data["state"] for record in control_plane.of_kind("state")]
        assert states.count("succeeded") == 1, where
        assert len(control_plane.of_kind("prepared")) == 1, where
        promoted = []
        for record in control_plane.events("ranks.started"):
            promoted += record.data["data"]["promoted"]
        assert promoted in ([], [1]), where
        assert has_spares or not promoted, where
        count = die_at
    # Those of the last job, whose driver was not killed.
    assert promoted == [1] * has_spares
    assert count > 60, "there are that many acts to die at"


def test_the_next_driver_is_of_another_version(tmp_path: Path) -> None:
    def upgrade(job: FakeJob) -> None:
        job.after_death = lambda: setattr(job.cluster, "version", "2")

    renewed = 0
    for die_at, job in jobs(tmp_path, upgrade):
        job.assert_nothing_left()
        assert job.control_plane.state is JobState.SUCCEEDED, f"died at act {die_at}"
        steps = sorted(job.control_plane.steps)
        assert steps == list(range(1, 9)), f"died at act {die_at}"
        states = [record.data for record in job.control_plane.of_kind("state")]
        renewed += any("new version" in (data.get("message") or "") for data in states)
    assert renewed > 10, "running ranks go on to a checkpoint first"


def test_a_driver_that_dies_while_it_renews_ranks_does_not_count_a_failure(
    tmp_path: Path,
) -> None:
    """The first driver is killed at a fixed act, the second, of a new version, at any."""
    for die_at in range(1, MAX_ACTS):
        folder = tmp_path / str(die_at)
        folder.mkdir()
        job = FakeJob(folder, dies=None)
        with pytest.raises(DriverDies):
            job.run_driver(FaultInjector(60))
        job.cluster.version = "2"
        is_unharmed = job.run_to_the_end(die_at)
        latest = Journal(job_storage(job)).latest()
        assert latest is not None
        assert latest.failures == 0, f"died at act {die_at}"
        assert job.control_plane.state is JobState.SUCCEEDED, f"died at act {die_at}"
        job.assert_nothing_left()
        if is_unharmed:
            return


def test_the_driver_is_lost_with_the_node_and_the_service_is_away(
    tmp_path: Path,
) -> None:
    """The ranks' files are gone: what happened before the last checkpoint is in the
    checkpoints.
    """

    def lose_all(job: FakeJob) -> None:
        job.control_plane.loses_reports = True

        def lost() -> None:
            job.cluster.workers.clear()
            job.control_plane.loses_reports = False

        job.after_death = lost

    for die_at, job in jobs(tmp_path, lose_all, dies=None):
        if job.control_plane.loses_reports:
            return  # nothing happened to the driver
        assert job.control_plane.state is JobState.SUCCEEDED, f"died at act {die_at}"
        missing = set(range(1, 9)) - job.control_plane.steps.keys()
        assert not missing, f"died at act {die_at}: steps {missing} are nowhere"


def test_a_cancelled_job_is_never_begun_again(tmp_path: Path) -> None:
    def cancel_at_step_3(job: FakeJob) -> None:
        control_plane = job.control_plane

        def cancel(process: FakeProcess) -> None:
            desired = control_plane.desired
            assert desired is not None
            if process.step == 3 and desired.desired is DesiredState.RUN:
                control_plane.desire(DesiredState.CANCEL)
                control_plane.state = JobState.CANCELLING

        job.cluster.on_step = cancel

    for die_at, job in jobs(tmp_path, cancel_at_step_3, dies=None):
        where = f"died at act {die_at}"
        job.assert_nothing_left()
        assert job.control_plane.state is JobState.CANCELLED, where
        assert max(job.control_plane.steps) <= 6, f"{where}: it ran on"
        assert set(attempt_states(job).values()) <= {"stopped", "failed"}, where


def test_a_paused_job_releases_its_resources_and_goes_on(tmp_path: Path) -> None:
    def pause_at_step_3(job: FakeJob) -> None:
        paused: list[int] = []

        def pause(process: FakeProcess) -> None:
            if process.step == 3 and not paused:
                paused.append(process.step)
                job.control_plane.desire(DesiredState.PAUSE)

        job.cluster.on_step = pause

    for die_at, job in jobs(tmp_path, pause_at_step_3, dies=None):
        where = f"died at act {die_at}"
        job.assert_nothing_left()
        assert job.control_plane.state is JobState.SUCCEEDED, where
        assert sorted(job.control_plane.steps) == list(range(1, 9)), where
        states = [record.data["state"] for record in job.control_plane.of_kind("state")]
        assert states.count("paused") == 1, where
        assert states.count("scheduling") == 2, where
        assert set(attempt_states(job).values()) <= {"stopped", "failed", "succeeded"}


def test_a_cancelled_job_is_resumed(tmp_path: Path) -> None:
    """The first driver ends the job; the one that resumes it dies at any act."""

    def cancel_at_step_3(job: FakeJob) -> None:
        cancelled: list[int] = []

        def cancel(process: FakeProcess) -> None:
            if process.step == 3 and not cancelled:
                cancelled.append(process.step)
                job.control_plane.desire(DesiredState.CANCEL)
                job.control_plane.state = JobState.CANCELLING

        job.cluster.on_step = cancel
        job.run_driver(FaultInjector())
        assert job.control_plane.state is JobState.CANCELLED
        job.control_plane.resume()

    for die_at, job in jobs(tmp_path, cancel_at_step_3, dies=None):
        where = f"died at act {die_at}"
        job.assert_nothing_left()
        assert job.control_plane.state is JobState.SUCCEEDED, where
        assert sorted(job.control_plane.steps) == list(range(1, 9)), where
        states = [record.data["state"] for record in job.control_plane.of_kind("state")]
        assert states.count("cancelled") == 1, where
        assert states.count("succeeded") == 1, where
        assert len(job.control_plane.of_kind("prepared")) == 1, where
        latest = Journal(job_storage(job)).latest()
        assert latest is not None
        assert latest.resumes == 1, where


def test_a_job_is_paused_before_it_runs(tmp_path: Path) -> None:
    def pause(job: FakeJob) -> None:
        job.control_plane.desire(DesiredState.PAUSE)

    for die_at, job in jobs(tmp_path, pause, dies=None):
        where = f"died at act {die_at}"
        job.assert_nothing_left()
        assert job.control_plane.state is JobState.SUCCEEDED, where
        states = [record.data["state"] for record in job.control_plane.of_kind("state")]
        assert states.count("paused") == 1, where
        assert states.count("scheduling") == 1, where


def test_a_stop_that_was_begun_holds_while_the_service_is_away(tmp_path: Path) -> None:
    """The stop is in the journal: a driver that comes back without having reached the
    service does not start the job again.
    """
    job = FakeJob(tmp_path, dies=None)
    job.control_plane.desired = None
    folder = str(tmp_path)
    ports = fake_ports(job.cluster, job.control_plane, folder)
    context = JobContext(JOB_ID, folder, ports)
    assert context.desired_state is DesiredState.RUN
    context.write(stopping=DesiredState.CANCEL)
    context = JobContext(JOB_ID, folder, ports)
    assert context.desired_state is DesiredState.CANCEL
