"""A job without Ray, in this process."""

import json
from pathlib import Path

import pytest

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
    assert skipped.startswith("warning: step 2 skipped, weights unchanged: loss ")
    assert skipped.endswith("(training.skip_steps leaves its samples out)")
    lines = [json.loads(line) for line in reports.read_text().splitlines()]
    kinds = [line["kind"] for line in lines if "step" in line["kind"]]
    assert kinds == ["step", "step", "skipped_step"]


def test_a_misspelt_field_has_a_suggestion(job: Path) -> None:
    with pytest.raises(UserError, match=r"/trainig: unknown field .* mean 'training'\?"):
        read_spec(job, ["trainig.steps=3"], 1)
    with pytest.raises(UserError, match=r"/model/preset: unknown preset 'gpt2-125m'; did"):
        read_spec(job, ["model.preset=gpt2-125m"], 1)
