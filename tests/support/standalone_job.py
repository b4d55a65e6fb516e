"""A job of one rank that runs in the test's process, without Ray."""

import json
from pathlib import Path
from typing import Any

import pytest

from workers.rank.messages import UserError
from workers.standalone import run_standalone

SPEC = """
model: {preset: gpt-tiny, num_layers: 1}
data: {train: [{path: corpus.txt}], tokenizer: {kind: bytes}, validation_fraction: 0}
training: {seq_length: 16, global_batch_size: 2, steps: 2, skip_steps: [2]}
optimizer: {lr: 0.001}
schedule: {warmup_steps: 4}
"""
PLAIN = ("training.skip_steps=[]", "schedule.warmup_steps=0")
EVERY = (*PLAIN, "training.steps=4", "checkpoint.every_steps=2", "checkpoint.keep_last=9")


def write_job(folder: Path) -> Path:
    """Writes a spec and its corpus, which is named relative to the folder."""
    (folder / "corpus.txt").write_text("one two three four five six seven\n" * 20)
    (folder / "job.yaml").write_text(SPEC)
    return folder / "job.yaml"


def run(job: Path, *overrides: str, resume: bool = False, **options: Any) -> str:
    """The line at the end of a run."""
    ending = run_standalone(
        job, overrides, options.pop("reports", None), resume=resume, **options
    )
    assert ending.message is not None
    return ending.message


def refusal(job: Path, *overrides: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(job, *overrides, **options)
    return str(caught.value)


def checkpoints(job: Path) -> list[Path]:
    return sorted((job.parent / "runs" / "job" / "checkpoints").glob("step-*"))


def losses(reports: Path) -> dict[int, float]:
    """The loss of each step in a file of reports."""
    rows = {}
    for line in reports.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "step":
            rows[record["data"]["step"]] = record["data"]["loss"]
    return rows


def zero(path: Path, start: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(400))
