"""Rows of steps and events, whose numbers are independent, are streamed as they happened."""

from datetime import UTC, datetime
from typing import Any

from service.api import events as module
from service.api.events import MAX_ROWS, _in_order
from service.api.models import Event
from workers.protocol.events import EventLevel


def event(seq: int, type: str, attempt: int = 1, **data: Any) -> Event:
    return Event(
        id=f"job-x.{seq}",
        seq=seq,
        job_id="job-x",
        attempt=attempt,
        created_at=datetime(2026, 11, 30, tzinfo=UTC),
        level=EventLevel.INFO,
        type=type,
        message="",
        data=data,
        ranks=[],
        actor="system",
    )


def rows(first: int, last: int, attempt: int = 1) -> list[dict[str, Any]]:
    return [{"step": step, "attempt": attempt} for step in range(first, last + 1)]


def order(steps: list[dict[str, Any]], history: list[Event]) -> list[str]:
    parts = []
    for part in _in_order(steps, history):
        if isinstance(part, Event):
            parts.append(part.type)
        else:
            parts.append(f"{part[0]['attempt']}: {part[0]['step']}-{part[-1]['step']}")
    return parts


def test_a_history_is_told_in_its_order() -> None:
    history = [
        event(1, "job.created", attempt=0),
        event(2, "attempt.started"),
        event(3, "eval.completed", step=4),
        event(4, "checkpoint.committed", step=4),
        event(5, "attempt.failed"),
        event(6, "attempt.started", attempt=2),
        event(7, "job.succeeded", attempt=2),
    ]
    assert order([*rows(1, 6), *rows(5, 9, attempt=2)], history) == [
        "job.created",
        "attempt.started",
        "1: 1-4",
        "eval.completed",
        "checkpoint.committed",
        "1: 5-6",
        "attempt.failed",
        "attempt.started",
        "2: 5-9",
        "job.succeeded",
    ]


def test_events_wait_for_steps_that_were_not_read_yet() -> None:
    history = [
        event(1, "attempt.started"),
        event(2, "checkpoint.committed", step=MAX_ROWS + 5),
    ]
    assert order(rows(1, MAX_ROWS), history) == ["attempt.started", f"1: 1-{MAX_ROWS}"]
    later = rows(MAX_ROWS + 1, MAX_ROWS + 7)
    assert order(later, history[1:]) == [
        f"1: {MAX_ROWS + 1}-{MAX_ROWS + 5}",
        "checkpoint.committed",
        f"1: {MAX_ROWS + 6}-{MAX_ROWS + 7}",
    ]


def test_steps_wait_for_events_that_were_not_read_yet(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MAX_EVENTS", 1)
    assert order(rows(1, 3), [event(1, "attempt.started")]) == ["attempt.started"]
