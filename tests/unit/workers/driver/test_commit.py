"""When a checkpoint is whole, and what it contains."""

import math
from pathlib import Path
from typing import Any

from megatron_ray.checkpoint.directory import checkpoint_path
from workers.driver.commit import (
    CheckpointLedger,
    WholeCheckpoint,
    commit_whole,
    contained_records,
)


def step(n: int) -> dict[str, Any]:
    return {"n": n, "kind": "step", "data": {"step": n, "loss": 1.0 / n}}


def numbers_of(whole: WholeCheckpoint) -> list[int]:
    return [record["n"] for record in whole.reports]


def test_whole_when_every_rank_wrote_and_the_step_is_reported() -> None:
    ledger = CheckpointLedger(2, attempt=3)
    for n in (1, 2):
        ledger.reported(step(n))
    ledger.written(0, 2, "/c/2", 10)
    assert ledger.take_whole() is None
    assert ledger.is_waiting
    ledger.written(1, 2, "/c/2", 5)
    whole = ledger.take_whole()
    assert whole is not None
    assert (whole.step, whole.attempt, whole.path, whole.bytes_written, whole.loss) == (
        2,
        3,
        "/c/2",
        15,
        0.5,
    )
    assert whole.reports == (step(1), step(2))
    assert ledger.take_whole() is None
    assert not ledger.is_waiting


def test_a_report_that_comes_later_holds_the_commit_back() -> None:
    ledger = CheckpointLedger(1, attempt=1)
    ledger.written(0, 2, "/c/2", 1)
    ledger.reported(step(1))
    assert ledger.take_whole() is None
    ledger.reported(
        {"kind": "eval", "data": {"step": 2, "split": "validation", "loss": 3.0}}
    )
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
    first = ledger.take_whole()
    second = ledger.take_whole()
    assert first is not None
    assert second is not None
    assert numbers_of(first) == [1, 2]
    assert numbers_of(second) == [3, 4]


def event(n: int) -> dict[str, Any]:
    return {"n": n, "kind": "event", "data": {"type": "rank.phase"}}


def test_events_between_steps_are_contained_so_that_no_number_is_missing() -> None:
    ledger = CheckpointLedger(1, attempt=1)
    for record in (event(1), step(2), event(3), step(4), event(5)):
        ledger.reported(record)
    ledger.written(0, 4, "/c/4", 1)
    whole = ledger.take_whole()
    assert whole is not None
    assert numbers_of(whole) == [1, 2, 3, 4]


def test_what_the_service_lacks_is_contained_again() -> None:
    """The checkpoint with it may be deleted before the service is back."""
    ledger = CheckpointLedger(1, attempt=1)
    contained = []
    for n, stored in ((2, 0), (4, 0), (6, 3), (8, 8)):
        ledger.reported(event(n - 1))
        ledger.reported(step(n))
        ledger.written(0, n, f"/c/{n}", 1)
        whole = ledger.take_whole(stored)
        assert whole is not None
        assert whole.loss == 1.0 / n
        contained.append(numbers_of(whole))
    assert contained == [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8]]


def test_what_checkpoints_contain_is_read_back_by_source(tmp_path: Path) -> None:
    def save(at: int, attempt: int, records: list[dict[str, Any]]) -> None:
        path = Path(checkpoint_path(str(tmp_path), at, attempt))
        path.mkdir(parents=True)
        (path / "index.json").write_text('{"files": {}}')
        commit_whole(
            WholeCheckpoint(at, attempt, str(path), 1, tuple(records), 1.0),
            str(tmp_path),
            9,
            {},
        )

    save(2, 1, [event(1), step(2)])
    # a driver that came back has read one again
    save(4, 1, [step(2), event(3), step(4)])
    save(6, 2, [step(6)])
    save(
        8, 3, [{"kind": "step", "data": {"step": 8}}]
    )  # under torchrun they have no numbers
    (tmp_path / "checkpoints" / "step-00000010-a0001").mkdir()
    records = contained_records(str(tmp_path))
    numbers = {}
    for source, lines in records.items():
        numbers[source] = [line.n for line in lines]
    assert numbers == {
        "a1/r0": [1, 2, 3, 4],
        "a2/r0": [6],
        "a3/r0": [],
    }
    assert records["a2/r0"][0].value() == step(6)


def test_a_checkpoint_after_a_skipped_step_has_no_loss() -> None:
    ledger = CheckpointLedger(1, attempt=1)
    skipped = step(2)
    skipped["data"]["loss"] = math.nan
    ledger.reported(skipped)
    ledger.written(0, 2, "/c/2", 1)
    whole = ledger.take_whole()
    assert whole is not None
    assert whole.loss is None
