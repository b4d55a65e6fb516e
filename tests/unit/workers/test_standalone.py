"""A job without Ray, in this process."""

import json
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ray.checkpoint.claim import Claim
from megatron_ray.checkpoint.directory import DamagedCheckpointError
from megatron_ray.checkpoint.hf.exporting import export_folder
from megatron_ray.checkpoint.hf.importing import import_folder
from megatron_ray.commands import Command
from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.inference.generate import generate, load_model
from megatron_ray.storage.errors import DiskFullError
from megatron_ray.storage.storage import LocalStorage, open_storage
from megatron_ray.validation.check import find_warnings
from tests.support.hf_folders import publish
from tests.support.standalone_job import (
    EVERY,
    PLAIN,
    checkpoints,
    losses,
    refusal,
    run,
    write_job,
    zero,
)
from workers import standalone
from workers.data_tasks import prepare_data
from workers.decisions.journal_entry import Ending, JournalEntry, Phase
from workers.driver.journal import Journal
from workers.job_file import read_spec
from workers.rank.messages import UserError
from workers.rank.spool import Spool
from workers.standalone import TrainingFailedError, run_standalone
from workers.stop_signals import StopSignals


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_job(tmp_path)


def test_a_model_that_cannot_be_exported_is_noted(job: Path) -> None:
    spec = read_spec(job, ["model.position_embedding=none"], 1)
    *_, line = standalone.warning_lines(spec)
    assert line.startswith(
        "warning: /model/position_embedding: checkpoints cannot be exported"
    )


def test_warnings_and_skipped_steps_are_seen(job: Path) -> None:
    reports = job.parent / "reports.jsonl"
    notices: list[str] = []
    ending = run_standalone(job, [], reports, resume=False, notify=notices.append)
    assert ending.message is not None
    assert ending.message.startswith("finished; newest checkpoint: ")
    warmup, skipped = notices
    assert warmup.startswith(
        "warning: /schedule/warmup_steps: warmup_steps=4 is not shorter than training.steps=2"
    )
    assert skipped == (
        "warning: step 2 skipped, weights unchanged: its samples are left out by "
        "training.skip_steps"
    )
    lines = [json.loads(line) for line in reports.read_text().splitlines()]
    kinds = [line["kind"] for line in lines if "step" in line["kind"]]
    assert kinds == ["step", "step", "skipped_step"]


def test_the_first_report_has_the_data_and_the_steps_of_a_number_of_epochs(
    job: Path,
) -> None:
    reports = job.parent / "reports.jsonl"
    overrides = ["training.epochs=0.2", "training.skip_steps=[]", "data.shuffle=false"]
    overrides.append("schedule.warmup_steps=2")
    run_standalone(job, overrides, reports, resume=False)
    lines = [json.loads(line) for line in reports.read_text().splitlines()]
    assert lines[0]["data"]["phase"] == "prepare"
    # A fifth of 681 tokens: 8 samples of 16 in steps of 2.
    assert lines[0]["data"]["detail"] == {
        "steps": 4,
        "train_documents": 1,
        "train_tokens": 681,
        "validation_documents": 0,
        "validation_tokens": 0,
        "notes": [],
    }
    steps = [line["data"]["step"] for line in lines if line["kind"] == "step"]
    assert steps == [1, 2, 3, 4]
    # Rules about steps wait for the data.
    overrides[1] = "training.skip_steps=[1, 2, 3, 4]"
    overrides.append(f"storage.path={job.parent}/second")
    with pytest.raises(UserError, match=r"/training/skip_steps: all of training\.steps=4"):
        run_standalone(job, overrides, reports, resume=False)


def test_a_misspelt_field_has_a_suggestion(job: Path) -> None:
    with pytest.raises(UserError, match=r"/trainig: unknown field .* mean 'training'\?"):
        read_spec(job, ["trainig.steps=3"], 1)
    with pytest.raises(UserError, match=r"/model/preset: unknown preset 'gpt2-125m'; did"):
        read_spec(job, ["model.preset=gpt2-125m"], 1)


def test_a_spec_that_only_measures_is_refused(job: Path) -> None:
    message = refusal(job, "preflight.mode=only")
    assert "/preflight/mode: only the service measures nodes without training" in message
    assert "megatron-ray cluster check" in message
    # Where there is no driver to judge it, the measurement is left out.
    assert read_spec(job, ["preflight.mode=before_training"], 1).preflight.min_ratio == 0.8


def test_numbers_without_effect_are_noted_once_epochs_are_steps(job: Path) -> None:
    overrides = ["training.steps=null", "training.epochs=1", "schedule.warmup_steps=1000"]
    spec = read_spec(job, [*overrides, "training.skip_steps=[]"], 1)
    assert find_warnings(spec) == []
    notes = prepare_data(spec).notes
    assert any(
        "/schedule/warmup_steps: warmup_steps=1000 is not shorter than" in note
        for note in notes
    )


def test_a_second_run_in_a_folder_is_refused_with_both_remedies(job: Path) -> None:
    run(job, *EVERY)
    message = refusal(job, *EVERY, "training.seed=7")
    assert "/storage/path: " in message
    assert "holds committed checkpoints of another run, up to step 4" in message
    assert "--resume, or give this one a storage.path of its own" in message
    assert len(checkpoints(job)) == 2
    # Both remedies lead to a run.
    assert run(job, *EVERY, resume=True).startswith("nothing was left to do: ")
    elsewhere = f"storage.path={job.parent}/elsewhere"
    assert run(job, *EVERY, "training.seed=7", elsewhere).startswith("finished; ")


def test_a_resume_keeps_the_runs_id_and_prunes_only_its_own(job: Path) -> None:
    run(job, *EVERY)
    first = json.loads((checkpoints(job)[0] / "manifest.json").read_text())
    assert first["run"].startswith("run-")
    more = ("training.steps=6", "checkpoint.resume_changes=[training.steps]")
    notices: list[str] = []
    run(job, *EVERY, *more, "checkpoint.keep_last=1", resume=True, notify=notices.append)
    assert notices == ["resuming with a change: training.steps is 6, and was 4 until now"]
    (last,) = checkpoints(job)
    manifest = json.loads((last / "manifest.json").read_text())
    assert (manifest["run"], manifest["first_attempt"]) == (first["run"], 1)
    assert last.name == "step-00000006-a0002"


def test_a_finished_run_names_its_checkpoint_and_needs_no_data(job: Path) -> None:
    run(job, *PLAIN)
    (job.parent / "corpus.txt").unlink()
    assert run(job, *PLAIN, resume=True) == (
        "nothing was left to do: the run has all of its 2 steps; newest checkpoint: "
        f"{checkpoints(job)[-1]}"
    )


def test_resuming_an_empty_folder_begins_a_run_and_names_that(job: Path) -> None:
    notices: list[str] = []
    assert run(job, *PLAIN, resume=True, notify=notices.append).startswith("finished")
    assert notices == [
        f"{job.parent}/runs/job holds no checkpoint; the run begins at step 0"
    ]


def test_damage_of_any_kind_is_named_and_kept_and_an_older_checkpoint_resumes(
    job: Path,
) -> None:
    run(job, *EVERY, "training.steps=6")
    _, middle, newest = checkpoints(job)
    with (newest / "data" / "rank-00000.bin").open("r+b") as file:
        file.truncate(1000)
    zero(middle / "data" / "rank-00000.bin", 5000)
    notices: list[str] = []
    reports = job.parent / "reports.jsonl"
    keep_one = (*EVERY, "training.steps=6", "checkpoint.keep_last=1")
    run(job, *keep_one, resume=True, notify=notices.append, reports=reports)
    assert "step-00000006-a0001: its file data/rank-00000.bin has 1000 bytes" in notices[0]
    assert "step-00000004-a0001: its file data/rank-00000.bin has other bytes" in notices[1]
    assert min(losses(reports)) == 3
    assert middle.is_dir()
    assert newest.is_dir()
    for path in checkpoints(job):
        (path / "index.json").unlink()
    message = refusal(job, *keep_one, resume=True)
    assert "none of its committed checkpoints is whole" in message
    for path in checkpoints(job):
        assert f"{path}: its file " in message


def test_another_configuration_is_one_message_before_data_are_prepared(job: Path) -> None:
    run(job, *PLAIN)
    (job.parent / "corpus.txt").unlink()
    message = refusal(job, *PLAIN, "model.hidden_size=256", resume=True)
    first, line = message.splitlines()
    assert first == "the job cannot start:"
    assert line.startswith("  /model/hidden_size: 256, but the checkpoint ")
    assert "was made with 128; set it back, or start another run" in line


def test_a_later_run_in_the_same_folder_ends_the_earlier_one(job: Path) -> None:
    def claim(line: str) -> None:
        Claim(9, "run-other").write(f"{job.parent}/runs/job")

    with pytest.raises(TrainingFailedError, match=r"attempt 9 \(run run-other\)") as caught:
        run(job, *PLAIN, "training.skip_steps=[1]", notify=claim)
    assert caught.value.exit_code == 2
    assert not (checkpoints(job)[0] / "COMMITTED").exists()


def test_a_folder_of_a_services_job_is_refused_while_it_runs(job: Path) -> None:
    storage = open_storage(f"{job.parent}/runs/job")
    entry = JournalEntry(job_id="job-a", phase=Phase.RUNNING)
    Journal(storage).write(entry)
    assert "belongs to job-a, a job of a service; give this run" in refusal(job, *PLAIN)
    assert "cancel job-a first, or" in refusal(job, *PLAIN, resume=True)
    ended = entry.model_copy(update={"ending": Ending(state="cancelled")})
    Journal(storage).write(ended)
    assert run(job, *PLAIN, resume=True).startswith("finished")


def test_files_that_cannot_be_written_are_refused_before_data_are_prepared(
    job: Path,
) -> None:
    (job.parent / "corpus.txt").rename(job.parent / "moved.txt")
    (job.parent / "file").write_text("")
    message = refusal(job, *PLAIN, f"storage.path={job.parent}/file/run")
    assert "/storage/path: " in message
    assert "cannot be written where the job runs" in message
    reports = job.parent / "file" / "reports.jsonl"
    assert refusal(job, *PLAIN, reports=reports).startswith(
        f"cannot write --reports {reports}"
    )


def test_checkpoints_that_do_not_fit_the_disk_are_refused(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "megatron_ray.checkpoint.disk_space.free_bytes", lambda _: 1_000_000
    )
    message = refusal(job, *EVERY)
    assert "/storage/path: " in message
    assert "has 1.0 MB free, but 2 checkpoints of" in message
    assert "lower checkpoint.keep_last" in message


def test_a_disk_that_fills_later_is_one_message_with_the_remedy(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LocalStorage.write_bytes_atomic

    def full_at_step_4(self: LocalStorage, name: str, data: bytes) -> None:
        if "step-00000004" in self.root and name == "COMMITTED":
            raise DiskFullError("write", self.root, "No space left on device")
        write(self, name, data)

    monkeypatch.setattr(LocalStorage, "write_bytes_atomic", full_at_step_4)
    with pytest.raises(TrainingFailedError) as caught:
        run(job, *EVERY, "training.steps=500")
    message = str(caught.value)
    assert "No space left on device; free some space there, or lower" in message
    assert message.endswith("newest checkpoint: " + str(checkpoints(job)[0]))
    assert caught.value.exit_code == 1
    # It did not train on without checkpoints.
    assert len(checkpoints(job)) < 20


def test_a_part_that_the_storage_refuses_is_a_warning_and_the_run_goes_on(
    job: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write = LocalStorage.write_bytes_atomic

    def full_at_step_2(self: LocalStorage, name: str, data: bytes) -> None:
        if "step-00000002" in self.root:
            raise DiskFullError("write", self.uri(name), "No space left on device")
        write(self, name, data)

    monkeypatch.setattr(LocalStorage, "write_bytes_atomic", full_at_step_2)
    run(job, *EVERY)
    assert [path.name for path in checkpoints(job)] == ["step-00000004-a0001"]
    line = next(line for line in capfd.readouterr().err.splitlines() if "rank 0" in line)
    assert line.startswith(
        "warning: rank 0 could not write its part of the checkpoint of step 2, and training "
        f"goes on: cannot write {job.parent}"
    )
    assert "No space left on device; free some space there, or lower" in line


def test_a_report_file_on_a_full_disk_is_one_message(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Spool.append

    def full(self: Spool, kind: str, data: Mapping[str, Any]) -> int:
        if kind == "step":
            raise OSError(28, "No space left on device")
        return append(self, kind, data)

    monkeypatch.setattr(Spool, "append", full)
    with pytest.raises(TrainingFailedError) as caught:
        run(job, *PLAIN, reports=job.parent / "reports.jsonl")
    assert str(caught.value) == (
        f"cannot write --reports {job.parent}/reports.jsonl: No space left on device"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_after_a_checkpoint_from_which_it_goes_on(
    job: Path, number: signal.Signals
) -> None:
    # The step that is skipped is the moment at which the signal comes.
    six = ("schedule.warmup_steps=0", "training.steps=6", "training.skip_steps=[3]")
    elsewhere = f"storage.path={job.parent}/elsewhere"
    run(job, *six, elsewhere, reports=job.parent / "whole.jsonl")
    notices: list[str] = []
    handler = signal.getsignal(number)

    def stop(line: str) -> None:
        notices.append(line)
        if "skipped" in line:
            os.kill(os.getpid(), number)

    first = job.parent / "first.jsonl"
    ending = run_standalone(job, six, first, resume=False, notify=stop)
    assert ending.exit_code == 128 + number
    assert ending.message is not None
    match = re.fullmatch(
        rf"stopped after step (\d) by {number.name}; newest checkpoint: (.*); --resume goes on "
        "from it",
        ending.message,
    )
    assert match is not None
    assert (Path(match[2]) / "COMMITTED").exists()
    assert (
        f"{number.name}: the run saves a checkpoint after this step and ends" in notices[-1]
    )
    run(job, *six, resume=True, reports=job.parent / "second.jsonl")
    assert min(losses(job.parent / "second.jsonl")) == int(match[1]) + 1
    together = {**losses(job.parent / "first.jsonl"), **losses(job.parent / "second.jsonl")}
    assert together == losses(job.parent / "whole.jsonl"), "bit for bit"
    assert signal.getsignal(number) is handler


def test_a_run_ends_at_its_limits_and_goes_on_bit_for_bit(job: Path) -> None:
    options = (*PLAIN, "training.steps=6", "checkpoint.every_steps=100")
    elsewhere = f"storage.path={job.parent}/elsewhere"
    run(job, *options, elsewhere, reports=job.parent / "whole.jsonl")
    together: dict[int, float] = {}
    messages = []
    limits = ["training.max_duration_s=0.0001", "training.exit_every_steps=3"]
    for number, limit in enumerate([*limits, "training.steps=6"]):
        reports = job.parent / f"{number}.jsonl"
        ending = run_standalone(job, (*options, limit), reports, resume=number > 0)
        assert ending.message is not None
        messages.append((ending.exit_code, ending.message))
        together |= losses(reports)
    assert together == losses(job.parent / "whole.jsonl"), "bit for bit"
    folder = job.parent / "runs" / "job" / "checkpoints"
    assert messages[0] == (
        75,
        f"ended after step 1 by training.max_duration_s; newest checkpoint: {folder}/"
        "step-00000001-a0001; --resume goes on from it",
    )
    assert messages[1] == (
        75,
        f"ended after step 3 by training.exit_every_steps; newest checkpoint: {folder}/"
        "step-00000003-a0002; --resume goes on from it",
    )
    assert messages[2][0] == 0


def test_every_signal_of_a_planned_end_is_handled() -> None:
    # A closed terminal, and what batch systems send ahead of time.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        with StopSignals(lambda _: None) as signals:
            signal.raise_signal(number)
            assert signals.received is number
            assert signals.command() is Command.CHECKPOINT_AND_STOP


def test_only_a_later_second_signal_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    sent = []
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("os.kill", lambda pid, number: sent.append(number))
    with StopSignals(lambda _: None, clock=lambda: now[0]) as signals:
        assert signals.command() is Command.CONTINUE
        signal.raise_signal(signal.SIGTERM)
        assert signals.command() is Command.CHECKPOINT_AND_STOP
        # A terminal and torchrun send the same one within moments.
        signal.raise_signal(signal.SIGTERM)
        assert sent == []
        now[0] += 2
        signal.raise_signal(signal.SIGINT)
        assert sent == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_imported_spec_may_be_edited_in_any_way_and_every_road_goes_on(
    job: Path,
) -> None:
    publish("llama", job.parent / "hf")
    (job.parent / "hf" / "tokenizer.json").write_text(Tokenizer.of_bytes().to_json())
    imported = job.parent / "imported"
    spec = Path(import_folder(str(job.parent / "hf"), str(imported)).spec)
    written = spec.read_text()
    corpus = str(job.parent / "corpus.txt")
    fields = yaml.safe_load(written)
    fields["data"]["train"] = [{"path": corpus}]
    fields["data"]["validation_fraction"] = 0
    fields["training"].update(seq_length=16, global_batch_size=2, steps=1)
    edits = {
        "longer": yaml.safe_dump(fields) + "# " + "a note for people " * 40,
        "shorter": json.dumps(fields),
    }
    for name, text in edits.items():
        # What editors and people leave beside it.
        (imported / "spec.yaml~").write_text(written)
        (imported / ".spec.yaml.swp").write_bytes(b"b0VIM")
        (imported / f"spec-{name}.yaml").write_text(text)
        spec.write_text(text)
        for path in (spec, imported / f"spec-{name}.yaml"):
            ending = run(path, f"storage.path={job.parent}/{path.stem}-{name}")
            assert ending.startswith("finished; newest checkpoint: ")
    assert export_folder(str(imported), str(job.parent / "back"))
    model, tokenizer = load_model(str(imported))
    assert generate(model, tokenizer, "hi", 2).tokens is not None
    # The tensors themselves are protected.
    zero(imported / "data" / "rank-00000.bin", 1000)
    with pytest.raises(DamagedCheckpointError, match="has other bytes than were written"):
        load_model(str(imported))
    with pytest.raises(TrainingFailedError, match="/checkpoint/start_from: ") as caught:
        run(spec, f"storage.path={job.parent}/other")
    assert caught.value.exit_code == 2
