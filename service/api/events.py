"""/v1/jobs/{id}/events and /stream: a job's history, read back or as it happens."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from megatron_ray.config.problem import Problem
from service.api import render
from service.api.models import Event, JobSummary, Page
from service.http.dependencies import Context, Service
from service.http.errors import ProblemError
from service.jobs import lifecycle
from service.store import metrics
from service.store.schema import EventRow, JobRow

MOST_ROWS = 1000
MOST_EVENTS = 500
ROWS_PER_MESSAGE = 50
"""Small enough that a reader whose connection breaks all the time still gets on: what
is cut is sent again whole."""
_STREAM_ID = re.compile(r"(\d{1,18})(?:\.(\d{1,18}))?")
router = APIRouter(prefix="/v1", tags=["history"])


@router.get("/jobs/{job_id}/events")
def list_events(
    job_id: str,
    service: Service,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[
        str | None, Query(description="Id or seq of the last event of the page before.")
    ] = None,
    type: Annotated[
        str | None, Query(description="Types, separated by commas.", max_length=1000)
    ] = None,
    level: Annotated[
        str | None,
        Query(
            description="Levels (info, warn, error), separated by commas.", max_length=100
        ),
    ] = None,
    order: Annotated[
        Literal["asc", "desc"], Query(description="desc: newest first.")
    ] = "asc",
) -> Page[Event]:
    """A job's history, oldest first unless told otherwise.

    `seq` has no gaps and counts on across attempts and restarts.
    """
    with service.store.read() as session:
        job = lifecycle.find(session, job_id)
        statement = (
            _newest_first(job, after)
            if order == "desc"
            else _events_after(job, _seq(after, job_id))
        )
        if level is not None:
            statement = statement.where(EventRow.level.in_(level.split(",")))
        if type is not None:
            statement = statement.where(EventRow.type.in_(type.split(",")))
        rows = list(session.scalars(statement.limit(limit + 1)))
    found = [render.event(job_id, row) for row in rows[:limit]]
    return render.page(found, [item.id for item in found], has_more=len(rows) > limit)


@dataclass(frozen=True)
class Position:
    """What a stream's reader has: everything up to an event and a row of metrics."""

    seq: int = 0
    cursor: int = 0

    def __str__(self) -> str:
        return f"{self.seq}.{self.cursor}"


@dataclass(frozen=True)
class _News:
    rows: list[dict[str, Any]]
    events: list[Event]
    summary: JobSummary | None
    """None: the job has been deleted."""


def start_position(
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
    after: Annotated[
        str | None,
        Query(description="As Last-Event-ID, for clients that cannot set headers."),
    ] = None,
) -> Position:
    """Where a stream goes on."""
    given = last_event_id or after
    if not given:
        return Position()
    match = _STREAM_ID.fullmatch(given.strip())
    if match is None:
        detail = (
            f"{given[:80]!r} is no position; send the id of the last event received, such as "
            "12.340, or nothing to start over"
        )
        raise ProblemError(
            "request_invalid",
            detail,
            errors=[Problem("/header/Last-Event-ID", "position_invalid", detail)],
        )
    return Position(int(match[1]), int(match[2] or 0))


def may_stream(job_id: str, service: Service) -> str:
    """Checks made before the first byte: the job exists, and there is room for a
    stream.
    """
    if service.telemetry.open_streams >= service.settings.max_streams:
        text = f"{service.settings.max_streams} streams are open; close one, or try again"
        raise ProblemError("too_many_streams", text, headers={"Retry-After": "5"})
    with service.store.read() as session:
        lifecycle.find(session, job_id)
    return job_id


@router.get("/jobs/{job_id}/stream", response_class=EventSourceResponse)
async def stream_job(
    job_id: Annotated[str, Depends(may_stream)],
    service: Service,
    start: Annotated[Position, Depends(start_position)],
) -> AsyncIterator[ServerSentEvent]:
    """Everything that happens to a job, as server-sent events, each once and none left
    out.

    `event: <type>` carries an event of the history, `metrics` rows of steps, `state`
    the job as it is now; `end` follows the last. After a break, `Last-Event-ID` goes on
    exactly where it was.
    """
    with (
        service.telemetry.stream_open(),
        service.hub.ticket(lifecycle.job_topic(job_id)) as ticket,
    ):
        position = start
        shown = None
        while not service.hub.closed:
            news = await run_in_threadpool(_read, service, job_id, position)
            for first in range(0, len(news.rows), ROWS_PER_MESSAGE):
                rows = news.rows[first : first + ROWS_PER_MESSAGE]
                position = Position(position.seq, rows[-1]["cursor"])
                yield ServerSentEvent(
                    data={"rows": [_without_cursor(row) for row in rows]},
                    event="metrics",
                    id=str(position),
                )
            for event in news.events:
                position = Position(event.seq, position.cursor)
                yield ServerSentEvent(data=event, event=event.type, id=str(position))
            if news.summary is not None and news.summary != shown:
                shown = news.summary
                yield ServerSentEvent(data=shown, event="state")
            if len(news.rows) == MOST_ROWS or len(news.events) == MOST_EVENTS:
                continue
            if news.summary is None or news.summary.status.is_terminal:
                yield ServerSentEvent(
                    data={"status": news.summary.status if news.summary else "deleted"},
                    event="end",
                    id=str(position),
                )
                return
            if not await ticket.wait(service.settings.ping_s):
                yield ServerSentEvent(comment="ping")


def _read(service: Context, job_id: str, position: Position) -> _News:
    with service.store.read() as session:
        job = session.scalars(sa.select(JobRow).where(JobRow.id == job_id)).one()
        if job.deleted_at is not None:
            return _News([], [], None)
        rows = metrics.after(session, job, position.cursor, MOST_ROWS)
        events = [
            render.event(job_id, row)
            for row in session.scalars(_events_after(job, position.seq).limit(MOST_EVENTS))
        ]
        return _News(rows, events, _summary(session, job))


def _summary(session: Session, job: JobRow) -> JobSummary:
    return render.summaries(session, [job])[0]


def _without_cursor(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "cursor"}


def _events_after(job: JobRow, seq: int) -> sa.Select[EventRow]:
    return (
        sa.select(EventRow)
        .where(EventRow.job == job.number, EventRow.seq > seq)
        .order_by(EventRow.seq)
    )


def _newest_first(job: JobRow, after: str | None) -> sa.Select[EventRow]:
    statement = (
        sa.select(EventRow).where(EventRow.job == job.number).order_by(EventRow.seq.desc())
    )
    return (
        statement if after is None else statement.where(EventRow.seq < _seq(after, job.id))
    )


def _seq(after: str | None, job_id: str) -> int:
    text = "0" if after is None else after.removeprefix(f"{job_id}.")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        detail = (
            f"after={str(after)[:80]!r} is no event of {job_id}; "
            "use last_id of the page before"
        )
        raise ProblemError(
            "request_invalid",
            detail,
            errors=[Problem("/query/after", "unknown_id", detail)],
        )
    return int(text)
