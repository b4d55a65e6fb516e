"""Schedules of a run under torchrun, as its reports show them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.standalone_job import PLAIN, losses, refusal, run, write_job

GROWING = (
    *PLAIN,
    "training.steps=8",
    "training.global_batch_size=8",
    "training.rampup_batch_size={start: 2, increment: 2, samples: 20}",
    "schedule={kind: linear, warmup_samples: 7, min_lr: 1e-5}",
    "optimizer.weight_decay_schedule={kind: linear, end: 0.3}",
    "optimizer.switches=[{step: 6, lr: 5e-4, beta2: 0.9, schedule: {kind: constant}}]",
    "checkpoint.every_steps=4",
)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_job(tmp_path)


def steps(reports: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in reports.read_text().splitlines()]
    return [row["data"] for row in rows if row["kind"] == "step"]


def test_reports_count_the_samples_of_growing_batches(job: Path) -> None:
    reports = job.parent / "whole.jsonl"
    run(job, *GROWING, reports=reports)
    rows = steps(reports)
    # 2 samples in four steps, then 4, 4, 6 and 8.
    assert [row["consumed_samples"] for row in rows] == [2, 4, 6, 8, 12, 16, 22, 30]
    assert [row["num_tokens"] // 16 for row in rows] == [2, 2, 2, 2, 4, 4, 6, 8]
    assert [row["lr"] for row in rows] == pytest.approx(
        [
            *(1e-3 * samples / 7 for samples in (2, 4, 6)),
            *(1e-5 + (1e-3 - 1e-5) * (30 - samples) / 23 for samples in (8, 12)),
            *[5e-4] * 3,
        ]
    )
    assert [row["weight_decay"] for row in rows] == pytest.approx(
        [0.3 * samples / 30 for samples in (2, 4, 6, 8, 12, 16, 22, 30)]
    )


def test_a_run_goes_on_bit_for_bit_within_its_ramp_up(job: Path) -> None:
    elsewhere = f"storage.path={job.parent}/elsewhere"
    run(job, *GROWING, elsewhere, reports=job.parent / "whole.jsonl")
    run(job, *GROWING, "training.exit_every_steps=4", reports=job.parent / "first.jsonl")
    run(job, *GROWING, resume=True, reports=job.parent / "second.jsonl")
    together = losses(job.parent / "first.jsonl") | losses(job.parent / "second.jsonl")
    assert sorted(losses(job.parent / "second.jsonl")) == [5, 6, 7, 8]
    assert together == losses(job.parent / "whole.jsonl"), "bit for bit"


def test_tokens_and_another_switch_make_another_run(job: Path) -> None:
    """The ramp-up counts into the steps of a number of tokens, and numbers have effects."""
    by_tokens = [override for override in GROWING if "training.steps" not in override]
    run(job, *by_tokens, "training.tokens=480", reports=job.parent / "tokens.jsonl")
    rows = losses(job.parent / "tokens.jsonl")
    assert sorted(rows) == list(range(1, 9))
    other = [*GROWING, "optimizer.switches=[{step: 7, beta2: 0.1}]"]
    run(job, *other, f"storage.path={job.parent}/b", reports=job.parent / "b.jsonl")
    changed = losses(job.parent / "b.jsonl")
    assert [step for step in rows if rows[step] != changed[step]] == [7, 8]


def test_a_batch_that_cannot_grow_is_refused_with_the_nearest_sizes(job: Path) -> None:
    ramp_up = "training.rampup_batch_size={start: 3, increment: 4, samples: 20}"
    message = refusal(job, *GROWING, ramp_up, "training.micro_batch_size=2")
    assert (
        "/training/rampup_batch_size: start=3 and increment=4 do not lead to "
        "global_batch_size=8 in multiples of micro_batch_size x dp = 2 x 1 samples; use "
        "start=4 and increment=4" in message
    )
