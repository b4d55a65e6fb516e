"""A watched job without Ray, in this process: its reports, and its counts over a resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.standalone_job import PLAIN, checkpoints, run, write_job

SETTINGS = (
    *PLAIN,
    "training.steps=4",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=9",
)
UNIGRAM = "callbacks.unigram.every_steps=3"


def monitors(reports: Path) -> dict[int, dict[str, Any]]:
    rows = {}
    for line in reports.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "monitors":
            rows[record["data"]["step"]] = record["data"]["numbers"]
    return rows


def test_counts_of_labels_go_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = write_job(tmp_path)
    run(job, *SETTINGS, UNIGRAM, reports=tmp_path / "whole")
    (half, last) = checkpoints(job)
    whole = monitors(tmp_path / "whole")
    assert list(whole) == [3]
    # Two samples of 16 labels a step; the checkpoint lies between two reports.
    assert whole[3]["unigram_tokens"] == 3 * 2 * 16
    shutil.rmtree(last)
    run(job, *SETTINGS, UNIGRAM, resume=True, reports=tmp_path / "resumed")
    assert monitors(tmp_path / "resumed") == whole
    # What another run starts to watch is counted from there.
    shutil.rmtree(checkpoints(job)[-1])
    run(job, *SETTINGS, resume=True, reports=tmp_path / "off")
    assert monitors(tmp_path / "off") == {}
    longer = (*SETTINGS, "training.steps=6", "checkpoint.resume_changes=[training.steps]")
    run(job, *longer, UNIGRAM, resume=True, reports=tmp_path / "on")
    assert monitors(tmp_path / "on")[6]["unigram_tokens"] == 2 * 2 * 16
    assert half.exists()
