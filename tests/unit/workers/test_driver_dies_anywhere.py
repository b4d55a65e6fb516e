"""A driver that dies before or after any of its acts: the next one finishes the job,
and the history is as if nobody had died.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ray.storage.storage import LocalStorage
from tests.unit.workers.paper_cluster import (
    DriverDies,
    Mortality,
    PaperCluster,
    PaperGroup,
    PaperOutbox,
    PaperService,
)
from workers.driver import attempts, context, lifecycle, spares, supervision
from workers.driver.journal import DeadRank, Journal
from workers.driver.lifecycle import JobLifecycle
from workers.protocol.states import DesiredState, JobState
from workers.protocol.wire import NodeInfo

PREPARED = {
    "train": [],
    "validation": [],
    "tokenizer_path": "t",
    "vocab_size": 256,
    "end_of_document": 0,
    "unigram_nats": 5.0,
}
MOST_ACTS = 400


def _nothing(*_: Any) -> None:
    pass


class PaperLeftovers:
    """Notes whose last words were fetched."""

    start_sweep = await_sweep = staticmethod(_nothing)

    def __init__(self, heard: set[tuple[int, int]]) -> None:
        self._heard = heard

    def collect(self, dead: Iterable[DeadRank]) -> None:
        self._heard |= {(rank.attempt, rank.place.rank) for rank in dead}

    finish = collect


class AtOnce:
    """An executor in the caller's thread, so that every life goes the same way."""

    def __init__(self, **_: Any) -> None:
        pass

    def submit(self, body: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(body(*args))
        return future

    def shutdown(self, wait: bool) -> None:
        pass


class Paper:
    """One job, its cluster and its service; drivers come and go."""

    def __init__(
        self, folder: Path, patch: pytest.MonkeyPatch, dies: tuple[int, int] | None = (1, 5)
    ) -> None:
        self.folder = folder
        self.patch = patch
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
        self.cluster = PaperCluster(steps=8, every=2, dies=dies)
        self.service = PaperService(spec, str(folder))
        self.heard: set[tuple[int, int]] = set()
        self.after_death: Callable[[], None] = lambda: None

    def live(self, mortality: Mortality) -> None:
        """One incarnation, to the job's end or its own."""

        def write(storage: LocalStorage, name: str, data: bytes) -> None:
            """Without waiting for a disk: only the driver dies here, not the machine."""
            mortality.act()
            path = Path(storage.root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            mortality.act()

        node = NodeInfo(node_id="node", address="127.0.0.1", cpus=4)
        with self.patch.context() as patch:
            patch.setattr(LocalStorage, "write_bytes_atomic", write)
            patch.setattr(
                context,
                "Outbox",
                lambda job_id, book, said, epoch, recalled: PaperOutbox(
                    self.service, book, said, recalled
                ),
            )
            patch.setattr(
                lifecycle, "WorkerGroup", lambda *_: PaperGroup(self.cluster, mortality)
            )
            patch.setattr(lifecycle, "DeadRankFiles", lambda *_: PaperLeftovers(self.heard))
            patch.setattr(lifecycle, "read_nodes", lambda: (node,))
            patch.setattr(lifecycle.tasks, "anywhere", lambda *_: None)
            patch.setattr(lifecycle.tasks, "is_done", lambda _: True)
            patch.setattr(lifecycle.tasks, "end", lambda _: None)
            patch.setattr(lifecycle.tasks, "result", lambda _: {"prepared": PREPARED})
            patch.setattr(supervision, "ThreadPoolExecutor", AtOnce)
            for user in (attempts, lifecycle):
                patch.setattr(user, "code_version", lambda: self.cluster.version)
            patch.setattr(
                attempts, "TrainingGauges", lambda _: SimpleNamespace(show=_nothing)
            )
            JobLifecycle("job-p", str(self.folder), "paper", object).run()

    def to_the_end(self, die_at: int) -> bool:
        """Whether the first driver lived to see it; those after it are immortal."""
        mortality = Mortality(die_at)
        try:
            self.live(mortality)
        except DriverDies:
            self.after_death()
            self.live(Mortality(0))
            return False
        return True

    def assert_nothing_left(self) -> None:
        assert self.cluster.workers == {}
        assert not self.cluster.placed
        assert self.service.ignored == []


def lives(
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    make: Callable[[Paper], None] = _nothing,
    **given: Any,
):
    """A job for each act of its driver that may be the last one."""
    for die_at in range(1, MOST_ACTS):
        folder = tmp_path / str(die_at)
        folder.mkdir()
        paper = Paper(folder, patch, **given)
        make(paper)
        unharmed = paper.to_the_end(die_at)
        yield die_at, paper
        if unharmed:
            return
    raise AssertionError(f"the job takes more than {MOST_ACTS} acts")


@pytest.mark.parametrize("stand_by", [False, True])
def test_a_job_with_a_failure_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_by: bool
) -> None:
    count = 0
    if stand_by:
        monkeypatch.setattr(spares, "AFTER_S", 0.0)
        monkeypatch.setattr(spares, "EVERY_S", 0.0)
    for die_at, paper in lives(tmp_path, monkeypatch):
        service = paper.service
        where = f"died at act {die_at}"
        paper.assert_nothing_left()
        assert service.state is JobState.SUCCEEDED, where
        assert sorted(service.steps) == list(range(1, 9)), where
        committed = [
            record.data["path"]
            for record in service.said("checkpoint")
            if record.data["action"] == "committed"
        ]
        deleted = [
            record.data["path"]
            for record in service.said("checkpoint")
            if record.data["action"] == "deleted"
        ]
        assert len(set(committed)) == len(committed), f"{where}: told twice"
        assert {int(path.rpartition("step-")[2].split("-")[0]) for path in committed} == {
            2,
            4,
            6,
            8,
        }, where
        left = {str(path.parent) for path in paper.folder.glob("checkpoints/*/COMMITTED")}
        assert set(committed) - set(deleted) == left, (
            f"{where}: what is listed is what is there"
        )
        latest = Journal(str(paper.folder)).latest()
        assert latest is not None and latest.failures == 1, (
            f"{where}: one failure is one failure"
        )
        (failed,) = [
            record.attempt
            for record in service.said("attempt")
            if record.data["state"] == "failed"
        ]
        assert paper.heard == {(failed, 1)}, f"{where}: a dead rank's last words"
        states = [record.data["state"] for record in service.said("state")]
        assert states.count("succeeded") == 1 and len(service.said("prepared")) == 1, where
        ended = {record.attempt: record.data["state"] for record in service.said("attempt")}
        assert set(ended.values()) <= {"succeeded", "failed", "stopped"}, (
            f"{where}: an attempt was left open"
        )
        assert list(ended.values()).count("failed") == 1, where
        assert any(
            record.data["data"]["retry"] for record in service.events("policy.decision")
        ), where
        promoted = [
            rank
            for record in service.events("ranks.started")
            for rank in record.data["data"]["promoted"]
        ]
        assert promoted in ([[], [1]] if stand_by else [[]]), where
        count = die_at
    assert promoted == ([1] if stand_by else []), "of the driver that nothing happened to"
    assert count > 60, "there are that many acts to die at"


def test_the_next_driver_is_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upgraded(paper: Paper) -> None:
        paper.after_death = lambda: setattr(paper.cluster, "version", "2")

    renewed = 0
    for die_at, paper in lives(tmp_path, monkeypatch, upgraded):
        paper.assert_nothing_left()
        assert paper.service.state is JobState.SUCCEEDED, f"died at act {die_at}"
        assert sorted(paper.service.steps) == list(range(1, 9)), f"died at act {die_at}"
        states = [record.data for record in paper.service.said("state")]
        renewed += any("new version" in (data.get("message") or "") for data in states)
    assert renewed > 10, "running ranks go on to a checkpoint first"


def test_the_driver_is_lost_with_the_node_and_the_service_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has the ranks' files any more: what happened before the last checkpoint is
    in the checkpoints.
    """

    def lose_all(paper: Paper) -> None:
        paper.service.away = True

        def lost() -> None:
            paper.cluster.workers.clear()
            paper.service.away = False

        paper.after_death = lost

    for die_at, paper in lives(tmp_path, monkeypatch, lose_all, dies=None):
        if paper.service.away:
            return  # nothing happened to the driver
        assert paper.service.state is JobState.SUCCEEDED, f"died at act {die_at}"
        missing = set(range(1, 9)) - paper.service.steps.keys()
        assert not missing, f"died at act {die_at}: steps {missing} are nowhere"


def test_a_cancelled_job_is_never_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel_at_step_3(paper: Paper) -> None:
        advance = paper.cluster.advance

        def watched(worker: Any) -> None:
            advance(worker)
            if worker.step == 3 and paper.service.desired.desired is DesiredState.RUN:
                paper.service.want(DesiredState.CANCEL)
                paper.service.state = JobState.CANCELLING

        monkeypatch.setattr(paper.cluster, "advance", watched)

    for die_at, paper in lives(tmp_path, monkeypatch, cancel_at_step_3, dies=None):
        where = f"died at act {die_at}"
        paper.assert_nothing_left()
        assert paper.service.state is JobState.CANCELLED, where
        assert max(paper.service.steps) <= 6, f"{where}: it ran on"
        ended = {
            record.attempt: record.data["state"] for record in paper.service.said("attempt")
        }
        assert set(ended.values()) <= {"stopped", "failed"}, where


def test_what_a_driver_had_begun_to_stop_stays_stopped_while_the_service_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wish is in the journal: a driver that comes back without having heard the
    service does not start the job again.
    """
    job_context = context.JobContext
    paper = Paper(tmp_path, monkeypatch, dies=None)
    monkeypatch.setattr(
        context, "Outbox", lambda *_: SimpleNamespace(desired=None, replaced=None)
    )
    job = job_context("job-p", str(paper.folder))
    assert job.wish is DesiredState.RUN
    job.write(stopping=DesiredState.CANCEL)
    assert job_context("job-p", str(paper.folder)).wish is DesiredState.CANCEL
