"""A job without Ray, in this process."""

import json
from pathlib import Path

import pytest

from workers import standalone
from workers.rank.messages import UserError
from workers.standalone import read_spec, run_standalone

SPEC = """
model: {preset: gpt-tiny, num_layers: 1}
data: {train: [{path: corpus.txt}], tokenizer: {kind: bytes}, validation_fraction: 0}
training: {seq_length: 16, global_batch_size: 2, steps: 2, skip_steps: [2]}
optimizer: {lr: 0.001}
schedule: {warmup_steps: 4}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("one two three four five six seven\n" * 20)
    (tmp_path / "job.yaml").write_text(SPEC)
    return tmp_path / "job.yaml"


def test_a_model_that_cannot_be_exported_is_noted(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = read_spec(job, ["model.position_embedding=none"], 1)
    standalone._print_warnings(spec)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: /model/position_embedding: checkpoints cannot be exported"
    )


def test_warnings_and_skipped_steps_are_seen(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = job.parent / "reports.jsonl"
    outcome = run_standalone(job, [], reports, False)
    assert outcome is not None
    assert outcome.startswith("finished; newest checkpoint: ")
    warmup, skipped = capsys.readouterr().err.splitlines()[-2:]
    assert warmup.startswith(
        "warning: /schedule/warmup_steps: warmup_steps=4 is not shorter than training.steps=2"
    )
    assert skipped.startswith("warning: step 2 skipped, weights unchanged: loss ")
    assert skipped.endswith("(training.skip_steps leaves its samples out)")
    lines = [json.loads(line) for line in reports.read_text().splitlines()]
    kinds = [line["kind"] for line in lines if "step" in line["kind"]]
    assert kinds == ["step", "step", "skipped_step"]


def test_the_first_report_has_the_data_and_the_steps_of_a_number_of_epochs(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = job.parent / "reports.jsonl"
    overrides = ["training.epochs=0.2", "training.skip_steps=[]", "data.shuffle=false"]
    run_standalone(job, overrides, reports, False)
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
    with pytest.raises(UserError, match=r"/training/skip_steps: all of training\.steps=4"):
        run_standalone(job, overrides, reports, False)


def test_a_misspelt_field_has_a_suggestion(job: Path) -> None:
    with pytest.raises(UserError, match=r"/trainig: unknown field .* mean 'training'\?"):
        read_spec(job, ["trainig.steps=3"], 1)
    with pytest.raises(UserError, match=r"/model/preset: unknown preset 'gpt2-125m'; did"):
        read_spec(job, ["model.preset=gpt2-125m"], 1)
