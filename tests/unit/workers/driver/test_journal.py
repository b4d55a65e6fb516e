"""What a restarted driver finds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.checkpoint.claim import Claim
from megatron_ray.checkpoint.directory import checkpoint_path, commit
from megatron_ray.storage.storage import open_storage
from tests.support.fake_cluster import FakeCluster, FakeControlPlane, fake_ports
from workers.agent.check_tasks import check_task
from workers.decisions.journal_entry import JournalEntry, Phase
from workers.driver.context import JobContext
from workers.driver.journal import ForeignJournalError, Journal, JournalError


def open_journal(folder: Path) -> Journal:
    return Journal(open_storage(str(folder)))


def test_the_highest_attempt_is_the_latest(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    assert journal.latest() is None
    for attempt in (0, 1, 10, 9):
        journal.write(JournalEntry(job_id="job-a", attempt=attempt, epoch=attempt + 1))
    latest = journal.latest()
    assert latest is not None
    assert (latest.attempt, latest.epoch) == (10, 11)
    assert (tmp_path / "attempts" / "0010.json").exists()


def test_an_entry_is_replaced_whole(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    entry = JournalEntry(
        job_id="job-a", store=("10.0.0.1", 4000), commits_at_failure=(1, 2)
    )
    journal.write(entry)
    journal.write(entry.model_copy(update={"phase": Phase.RUNNING}))
    latest = journal.latest()
    assert latest == entry.model_copy(update={"phase": Phase.RUNNING})
    assert [path.name for path in (tmp_path / "attempts").iterdir()] == ["0000.json"]


@pytest.mark.parametrize("text", ["", "{", '{"job_id": "a", "format_version": 2}', "[]"])
def test_what_is_no_entry_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "0003.json").write_text(text)
    with pytest.raises(
        JournalError, match=r"attempts/0003.json is not a journal entry of format 1"
    ):
        open_journal(tmp_path).latest()


def test_a_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    open_journal(tmp_path).write(JournalEntry(job_id="job-old", epoch=3))
    cluster = FakeCluster(steps=1, save_every=1)
    ports = fake_ports(cluster, FakeControlPlane({}, str(tmp_path)), str(tmp_path))
    with pytest.raises(
        ForeignJournalError,
        match=r"belongs to job-old; give this job a storage.path of its own, or leave it out",
    ):
        JobContext("job-new", str(tmp_path), ports)
    assert [path.name for path in tmp_path.iterdir()] == ["attempts"]
    latest = open_journal(tmp_path).latest()
    assert latest is not None
    assert latest.epoch == 3, "nothing was touched"


def spec_with_corpus(folder: Path) -> dict[str, Any]:
    """A spec whose corpus is written to the folder."""
    (folder / "corpus.txt").write_text("some words " * 1000)
    return {
        "model": {"preset": "gpt-tiny"},
        "data": {
            "train": [{"path": str(folder / "corpus.txt")}],
            "tokenizer": {"kind": "bytes"},
        },
        "training": {"seq_length": 16, "global_batch_size": 2, "steps": 1},
        "optimizer": {"lr": 0.001},
    }


def test_a_spec_that_names_a_folder_in_use_is_refused_before_it_is_a_job(
    tmp_path: Path,
) -> None:
    storage = tmp_path / "storage"
    open_journal(storage).write(JournalEntry(job_id="job-old"))
    spec = spec_with_corpus(tmp_path)
    (problem,) = check_task(spec, str(storage))["problems"]
    assert (problem["pointer"], problem["code"]) == ("/storage/path", "in_use")
    assert (
        "already holds another job (job-old); give this job a folder of its own"
        in problem["detail"]
    )
    assert check_task(spec, str(tmp_path / "fresh"))["problems"] == []
    # A run under torchrun that has no checkpoint yet.
    Claim(1, "run-1", "a start", "other-machine", 4711).write(str(tmp_path / "claimed"))
    (problem,) = check_task(spec, str(tmp_path / "claimed"))["problems"]
    assert "already holds a run without a service, process 4711 on" in problem["detail"]


def test_a_job_is_resumed_only_where_its_files_are(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    spec = spec_with_corpus(tmp_path)
    job = {"job_id": "job-a", "has_other_data": False, "had_driver": True}

    def problems(**changes: Any) -> str:
        rows = check_task(spec, str(storage), None, {**job, **changes})["problems"]
        return "; ".join(f"{row['pointer']}: {row['detail']}" for row in rows)

    assert problems(had_driver=False) == ""
    assert "/storage/path: " in problems()
    assert "no longer holds the files of this job; restore the folder" in problems()
    entry = JournalEntry(job_id="job-a", spec=spec)
    open_journal(storage).write(entry)
    assert problems() == ""
    assert "no longer holds the files of this job" in problems(job_id="job-b")
    open_journal(storage).write(entry.model_copy(update={"last_commit": 5}))
    assert "the checkpoint of step 5 was committed, and none is in" in problems()
    checkpoint = checkpoint_path(str(storage), 5, 1)
    open_storage(checkpoint).write_bytes_atomic("index.json", b'{"files": {}}')
    commit(checkpoint, {}, [])
    assert problems() == ""
    claim = Claim(2, "run-1", "a start", "other-machine", 4711)
    claim.write(str(storage))
    assert "in use by a run without a service, process 4711 on other-mach" in problems()
    replace(claim, has_ended=True).write(str(storage))
    # Unchanged data are prepared already, and may be gone by now.
    (tmp_path / "corpus.txt").unlink()
    assert problems() == ""
    assert problems(has_other_data=True).startswith("/data/train/0/path: ")


def test_a_new_job_is_refused_where_a_run_without_a_service_has_checkpoints(
    tmp_path: Path,
) -> None:
    storage = tmp_path / "storage"
    checkpoint = checkpoint_path(str(storage), 5, 1)
    open_storage(checkpoint).write_bytes_atomic("index.json", b'{"files": {}}')
    commit(checkpoint, {}, [])
    spec = spec_with_corpus(tmp_path)
    (problem,) = check_task(spec, str(storage))["problems"]
    assert (problem["pointer"], problem["code"]) == ("/storage/path", "in_use")
    assert "already holds committed checkpoints of a run without" in problem["detail"]


def test_a_new_job_is_refused_where_its_checkpoints_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ray.checkpoint.disk_space.free_bytes", lambda _: 10**6)
    spec = spec_with_corpus(tmp_path)
    spec["training"]["steps"] = 9
    spec["checkpoint"] = {"every_steps": 1}
    (problem,) = check_task(spec, str(tmp_path / "storage"))["problems"]
    assert (problem["pointer"], problem["code"]) == ("/storage/path", "disk_space")
    assert "has 1.0 MB free, but 3 checkpoints of" in problem["detail"]
