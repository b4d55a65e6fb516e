"""Where a run under torchrun begins: which checkpoint, data and folder it may use."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.checkpoint.claim import Claim, process_of, read_claim
from megatron_ray.data.prepared import PreparedData
from tests.support.standalone_job import (
    EVERY,
    PLAIN,
    checkpoints,
    losses,
    refusal,
    run,
    write_job,
)
from workers import standalone
from workers.data_tasks import prepare_data
from workers.standalone import TrainingFailedError

PATH = "runs/job"
MORE = (*EVERY, "training.steps=6", "schedule.kind=constant")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_job(tmp_path)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_other_text_at_the_same_path_is_refused_or_named(job: Path) -> None:
    run(job, *EVERY, "schedule.kind=constant")
    corpus = job.parent / "corpus.txt"
    text = corpus.read_text()
    # Written anew with the same content, it is no change.
    corpus.write_text(text)
    run(job, *MORE, "training.steps=5", resume=True)
    corpus.write_text(text + "another document\n\n" * 3)
    message = refusal(job, *MORE, resume=True)
    assert message.splitlines() == [
        "the job cannot start:",
        "  /data/train: the files have changed: they give 735 tokens in 1 documents to train "
        "on, and gave 681 tokens in 1 documents when the run was saved; samples would be "
        "others, with text that was trained on already; restore the files, or add data.train "
        "to checkpoint.resume_changes to go on with them",
    ]
    # Both remedies lead to a run.
    notices: list[str] = []
    change = "checkpoint.resume_changes=[data.train]"
    run(job, *MORE, change, resume=True, notify=notices.append)
    assert notices == [
        "warning: data.train: the files have changed: they give 735 tokens in 1 documents to "
        "train on, and gave 681 tokens in 1 documents when the run was saved"
    ]
    # From then on it is the run's text.
    run(job, *MORE, "training.steps=7", resume=True)
    corpus.write_text(text)
    assert "735 tokens in 1 documents when" in refusal(
        job, *MORE, "training.steps=8", resume=True
    )


def test_damaged_prepared_data_are_made_again_or_one_message(job: Path) -> None:
    run(job, *EVERY)
    data = job.parent / PATH / "data"
    for path in data.glob("indices/*/*.npy"):
        path.write_bytes(b"")
    reports = job.parent / "reports.jsonl"
    five = (*MORE, "training.steps=5", "checkpoint.resume_changes=[schedule.kind]")
    run(job, *five, resume=True, reports=reports)
    assert sorted(losses(reports)) == [5]
    (index,) = data.glob("corpora/*/*.idx")
    index.write_bytes(bytes(index.stat().st_size))
    with pytest.raises(TrainingFailedError) as caught:
        run(job, *MORE, resume=True)
    assert str(caught.value) == (
        f"/data: {index} is not a Megatron index: it does not start with MMIDIDX; delete its "
        "folder, and the data are prepared again"
    )
    assert caught.value.exit_code == 2
    shutil.rmtree(index.parent)
    assert run(job, *MORE, resume=True).startswith("finished; ")


@pytest.mark.parametrize("name", ["tokenizer.json", "train_state.json", "index.json"])
def test_one_flipped_bit_in_any_file_of_the_newest_is_passed_over(
    job: Path, name: str
) -> None:
    run(job, *EVERY)
    flip_a_bit(checkpoints(job)[-1] / name)
    notices: list[str] = []
    reports = job.parent / "second.jsonl"
    run(job, *EVERY, resume=True, notify=notices.append, reports=reports)
    (notice,) = notices
    assert f"a0001: its file {name} has other bytes than were written" in notice
    assert sorted(losses(reports)) == [3, 4]
    assert json.loads((checkpoints(job)[-1] / "manifest.json").read_text())["attempt"] == 2


def test_a_checkpoint_that_lacks_only_its_marker_is_not_lost(job: Path) -> None:
    run(job, *EVERY)
    first, newest = checkpoints(job)
    for path in (first, newest):
        (path / "COMMITTED").unlink()
    assert "holds committed checkpoints of another run, up to step 4" in refusal(
        job, *EVERY
    )
    # What a deletion has left is not a checkpoint any more.
    (first / "index.json").unlink()
    notices: list[str] = []
    message = run(job, *EVERY, resume=True, notify=notices.append)
    assert message == (
        f"nothing was left to do: the run has all of its 4 steps; newest checkpoint: {newest}"
    )
    assert notices == [f"{newest} lacked only its COMMITTED marker, which it has now"]


def running_elsewhere(attempt: int = 1) -> Claim:
    return Claim(attempt, "run-other", "another start", "other-machine", 4711)


def test_a_folder_in_which_a_run_is_running_is_refused(job: Path) -> None:
    # The parent of this process is another process that exists.
    pid = os.getppid()
    claim = Claim.of_this_process(3, "run-other")
    alive = replace(claim, pid=pid, process=process_of(pid))
    (job.parent / PATH).mkdir(parents=True)
    alive.write(PATH)
    for resume in (False, True):
        message = refusal(job, *PLAIN, resume=resume)
        assert "/storage/path: " in message
        assert "is in use by another run that has not ended: attempt 3 of run-o" in message
        assert message.endswith(
            "; stop it first, or give this one a storage.path of its own"
        )
    # Another process has its id by now.
    replace(alive, process="an earlier boot/1").write(PATH)
    run(job, *PLAIN)
    ended = read_claim(PATH)
    assert ended is not None
    assert (ended.attempt, ended.pid, ended.has_ended) == (4, os.getpid(), True)
    shutil.rmtree(job.parent / PATH / "checkpoints")
    replace(alive, has_ended=True).write(PATH)
    assert run(job, *PLAIN).startswith("finished; ")


def test_only_a_resume_takes_over_a_folder_of_another_machine(job: Path) -> None:
    (job.parent / PATH).mkdir(parents=True)
    running_elsewhere().write(PATH)
    message = refusal(job, *PLAIN)
    assert "process 4711 on other-machine; give this one a storage.path of its" in message
    assert message.endswith("if that one was killed, take the folder over with --resume")
    assert run(job, *PLAIN, resume=True).startswith("finished; ")


def test_of_two_runs_that_start_at_once_only_the_later_one_trains(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*arguments: Any, **options: Any) -> PreparedData:
        # Neither has seen the other one, so both have the same number.
        running_elsewhere(1).write(PATH)
        return prepare_data(*arguments, **options)

    monkeypatch.setattr(standalone, "prepare_data", prepare)
    message = refusal(job, *PLAIN)
    assert "attempt 1 (run run-other) was started in this folder after attempt 1" in message
    assert checkpoints(job) == []
    claim = read_claim(PATH)
    assert claim == running_elsewhere(), "the other one's claim stays"


def test_a_folder_among_another_runs_checkpoints_is_refused(job: Path) -> None:
    run(job, *EVERY)
    for place in (f"{PATH}/checkpoints", f"{checkpoints(job)[-1]}/mine/"):
        message = refusal(job, *PLAIN, f"storage.path={place}")
        assert "is inside the checkpoints of the run in " in message
        assert message.endswith("give this one a storage.path of its own")
    assert run(job, *PLAIN, "storage.path=checkpoints").startswith("finished; ")


def test_reports_spoil_no_other_file(job: Path) -> None:
    text = job.read_text()
    message = refusal(job, *PLAIN, reports=job)
    assert message.startswith(f"cannot write --reports {job}: the file has something other")
    assert job.read_text() == text
    # A neighbour is not a part of the reports, whatever its name is.
    neighbour = job.parent / "out.2"
    neighbour.write_text("notes without a newline")
    reports = job.parent / "out"
    reports.write_bytes(b'{"n":1,"at":17')
    run(job, *PLAIN, reports=reports)
    assert neighbour.read_text() == "notes without a newline"
    assert sorted(losses(reports)) == [1, 2]
    notices: list[str] = []
    other = "storage.path=runs/other"
    run(job, *PLAIN, other, reports=reports, notify=notices.append)
    assert notices == [
        f"warning: --reports {reports} has reports of another run, after which those of this "
        "one are written"
    ]
    message = refusal(job, *PLAIN, "storage.path=runs/full", reports=Path("/dev/full"))
    assert message == "cannot write --reports /dev/full: No space left on device"
