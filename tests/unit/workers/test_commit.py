"""When a checkpoint is whole."""

from workers.commit import CheckpointLedger


def step(n: int) -> dict[str, object]:
    return {"step": n, "loss": 1.0 / n}


def test_whole_when_every_rank_wrote_and_the_step_is_reported() -> None:
    ledger = CheckpointLedger(2, attempt=3)
    for n in (1, 2):
        ledger.reported(step(n))
    ledger.written(0, 2, "/c/2", 10)
    assert ledger.take_whole() is None
    assert ledger.waiting
    ledger.written(1, 2, "/c/2", 5)
    whole = ledger.take_whole()
    assert whole is not None
    assert (whole.step, whole.attempt, whole.path, whole.bytes_written, whole.loss) == (2, 3, "/c/2", 15, 0.5)
    assert [report["step"] for report in whole.reports] == [1, 2]
    assert ledger.take_whole() is None
    assert not ledger.waiting


def test_a_report_that_comes_later_holds_the_commit_back() -> None:
    ledger = CheckpointLedger(1, attempt=1)
    ledger.written(0, 2, "/c/2", 1)
    ledger.reported(step(1))
    assert ledger.take_whole() is None
    ledger.reported({"step": 2, "split": "validation", "loss": 3.0})
    assert ledger.take_whole() is None, "an evaluation is no step"
    ledger.reported(step(2))
    whole = ledger.take_whole()
    assert whole is not None
    assert len(whole.reports) == 3
    assert whole.loss == 0.5


def test_reports_go_to_the_checkpoint_they_belong_to() -> None:
    ledger = CheckpointLedger(1, attempt=1)
    for n in range(1, 7):
        ledger.reported(step(n))
    ledger.written(0, 4, "/c/4", 1)
    ledger.written(0, 2, "/c/2", 1)
    first, second = ledger.take_whole(), ledger.take_whole()
    assert first is not None
    assert second is not None
    assert [[report["step"] for report in whole.reports] for whole in (first, second)] == [[1, 2], [3, 4]]
