"""Serves /v1/jobs/{id}/events and /stream: a job's history, past and live."""

import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Header, Query
from pydantic import BeforeValidator, Field
from starlette.concurrency import run_in_threadpool

from service.api import render
from service.api.models import Event, JobId, JobSummary, Page
from service.exceptions import RequestInvalidError
from service.http.dependencies import Context, ContextDep
from service.http.errors import ProblemError
from service.http.event_stream import PING, EventStream, message
from service.http.parameters import WRITTEN_NUMBER, check_query, split_commas
from service.jobs import lifecycle
from service.store import metrics
from service.store.schema import EventRow, JobRow
from workers.protocol.events import EventLevel, EventType

Row = dict[str, Any]
MAX_ROWS = 1000
"""Rows of metrics read at once."""
MAX_EVENTS = 500
"""Events read at once."""
ROWS_PER_MESSAGE = 50
"""Small enough for progress on connections that break often, because an interrupted
message is sent again as a whole."""
_STREAM_ID = re.compile(r"(?P<job>[^.]{1,64})\.(?P<seq>\d{1,18})(\.(?P<cursor>\d{1,18}))?")


def _message_schema(event: Any, model: str) -> dict[str, Any]:
    """Returns the schema of one kind of server-sent events."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"#/components/schemas/{model}"},
    }
    properties = {"event": event, "id": {"type": "string"}, "data": data}
    return {"type": "object", "properties": properties, "required": ["event", "data"]}


_EVENTS_OF_STEPS = (
    "checkpoint.",
    "eval.",
    "rank.checkpoint_written",
    "rank.skipped_step",
    "rank.training_rule",
)
_EVENTS_AFTER_ALL_STEPS = frozenset(
    {
        EventType.ATTEMPT_ENDED,
        EventType.ATTEMPT_FAILED,
        EventType.JOB_RECOVERING,
        EventType.JOB_PAUSING,
        EventType.JOB_PAUSED,
        EventType.JOB_CANCELLING,
        EventType.JOB_CANCELLED,
        EventType.JOB_FAILED,
        EventType.JOB_SUCCEEDED,
        EventType.RANK_ENDED,
        EventType.RANK_FAILED,
    }
)
"""Events that follow the steps of their attempt."""
_OWN_MESSAGES = {"metrics": "StreamMetrics", "state": "JobSummary", "end": "StreamEnd"}
"""Names of messages that are no events of the job's history -> schema of their data."""
_MESSAGE = {
    "type": "object",
    "description": "One message. `data` is JSON.",
    "oneOf": [
        *[_message_schema({"const": name}, model) for name, model in _OWN_MESSAGES.items()],
        _message_schema({"type": "string", "not": {"enum": list(_OWN_MESSAGES)}}, "Event"),
    ],
}
router = APIRouter(prefix="/v1", tags=["history"], dependencies=[Depends(check_query)])


@router.get("/jobs/{job_id}/events")
def list_events(
    job_id: JobId,
    context: ContextDep,
    limit: Annotated[
        int, Field(ge=1, le=1000), WRITTEN_NUMBER, Query(description="Events per page.")
    ] = 100,
    after: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=100,
            description="Id or seq of the last event of the previous page.",
        ),
    ] = None,
    type: Annotated[
        list[EventType] | None,
        BeforeValidator(split_commas),
        Query(description="Types to list; may be repeated. Default: all."),
    ] = None,
    level: Annotated[
        list[EventLevel] | None,
        BeforeValidator(split_commas),
        Query(description="Levels to list; may be repeated. Default: all."),
    ] = None,
    order: Annotated[
        Literal["asc", "desc"],
        Query(description="`asc`: oldest first. `desc`: newest first."),
    ] = "asc",
) -> Page[Event]:
    """Lists a job's events, oldest first by default.

    `seq` has no gaps and continues across attempts and restarts.
    """
    with context.store.read() as session:
        job = lifecycle.find(session, job_id)
        # Filters are applied before the limit, so that a page of errors is full.
        chosen = sa.select(EventRow).where(EventRow.job == job.number)
        if level is not None:
            chosen = chosen.where(EventRow.level.in_(level))
        if type is not None:
            chosen = chosen.where(EventRow.type.in_(type))
        statement = chosen.order_by(EventRow.seq)
        if order == "desc":
            statement = chosen.order_by(EventRow.seq.desc())
        if after is not None:
            statement = statement.where(_is_after(job, after, order))
        # One extra row shows whether there is another page.
        rows = list(session.scalars(statement.limit(limit + 1)))
        numbers = chosen.with_only_columns(EventRow.seq).subquery()
        total = session.scalar(sa.select(sa.func.count()).select_from(numbers))
    events = render.events(job_id, rows[:limit])
    has_more = len(rows) > limit
    return render.page(events, lambda event: event.id, has_more=has_more, total=total)


@dataclass(frozen=True)
class Position:
    """The position of a stream's reader."""

    job_id: str
    seq: int = 0
    """Last event received."""
    cursor: int = 0
    """Last row of metrics received."""

    def __str__(self) -> str:
        return f"{self.job_id}.{self.seq}.{self.cursor}"


@dataclass(frozen=True)
class _Update:
    """The rows that have been stored after a position."""

    rows: list[dict[str, Any]]
    events: list[Event]
    summary: JobSummary | None
    """None: the job has been deleted."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing more was stored when it was read."""
        return len(self.rows) < MAX_ROWS and len(self.events) < MAX_EVENTS


def start_position(
    job_id: JobId,
    context: ContextDep,
    last_event_id: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            description="Id of the last message received. Default: start at the beginning.",
        ),
    ] = None,
    after: Annotated[
        str | None,
        Query(description="Same as Last-Event-ID, for clients that cannot set headers."),
    ] = None,
) -> Position:
    """Returns the position after which a stream starts.

    Runs before the first byte is sent, after which no error could be reported. Raises
    ProblemError when too many streams are open, NotFoundError, RequestInvalidError.
    """
    max_streams = context.settings.max_streams
    if context.telemetry.open_streams >= max_streams:
        detail = f"{max_streams} streams are open; close one or try again later"
        raise ProblemError("too_many_streams", detail, headers={"Retry-After": "5"})
    # Deleted jobs are not found either; a job deleted later ends its streams.
    with context.store.read() as session:
        job = lifecycle.find(session, job_id)
    # On the first connection the id is missing or empty.
    if last_event_id:
        return _position(job, last_event_id, "/header/Last-Event-ID")
    if after:
        return _position(job, after, "/query/after")
    return Position(job_id)


def _position(job: JobRow, stream_id: str, pointer: str) -> Position:
    """Returns the position that a message's id stands for.

    Raises RequestInvalidError for one that the job has not sent.
    """
    reason = ""
    position = Position(job.id)
    match = _STREAM_ID.fullmatch(stream_id.strip())
    if match is None:
        reason = "is no id of a message"
    elif match["job"] != job.id:
        reason = f"belongs to {match['job']}"
    else:
        position = Position(job.id, int(match["seq"]), int(match["cursor"] or 0))
        # After such a position everything would be skipped without an error.
        if position.seq > job.last_seq or position.cursor > job.metrics_cursor:
            reason = "is ahead of the job"
    if reason:
        detail = (
            f"{pointer.rpartition('/')[2]} {stream_id[:80]!r} {reason}; send the id of the last "
            f"message received, such as {job.id}.12.340, or omit it to start from the beginning"
        )
        raise RequestInvalidError.of_field(pointer, "position_invalid", detail)
    return position


@router.get(
    "/jobs/{job_id}/stream",
    response_class=EventStream,
    # Named, because the framework would look for it in the class.
    status_code=200,
    responses={200: {"content": {"text/event-stream": {"schema": _MESSAGE}}}, 429: {}},
)
async def stream_job(
    job_id: JobId,
    context: ContextDep,
    start: Annotated[Position, Depends(start_position)],
) -> EventStream:
    """Streams a job's history and everything that follows, as server-sent events.

    Every event and every row of metrics is sent exactly once. To continue after a broken
    connection, send `Last-Event-ID`.

    - `metrics`: rows of steps.
    - `state`: the job's current summary.
    - `end`: the last message; the job has ended or was deleted.
    - Any other name: an event of the job's history; the name is the event's type.
    """
    return EventStream(_stream(context, job_id, start))


async def _stream(
    context: Context, job_id: str, position: Position
) -> AsyncGenerator[bytes]:
    """Yields the messages after a position, until the job has ended."""
    notifier = context.notifier
    with (
        context.telemetry.stream_open(),
        # Subscribed before the first read, so that no commit in between is missed.
        notifier.subscribe(lifecycle.job_topic(job_id)) as subscription,
    ):
        sent_summary = None
        while not notifier.is_closed:
            update = await run_in_threadpool(_read_update, context, job_id, position)
            for reached, part in _messages(update, position):
                position = reached
                yield part
            # A long history is read in parts, without waiting between them.
            if not update.is_complete:
                continue
            # After the history that led to it. It has no id, so a reader that reconnects
            # gets the current one again.
            if update.summary is not None and update.summary != sent_summary:
                sent_summary = update.summary
                yield message(sent_summary, event="state")
            if update.summary is None:
                yield _end("deleted", position)
                return
            if update.summary.status.is_terminal:
                yield _end(update.summary.status, position)
                return
            if not await subscription.wait(context.settings.ping_s):
                yield PING


def _messages(update: _Update, position: Position) -> Iterator[tuple[Position, bytes]]:
    """Yields the messages of an update, each with the position after it, which is its id."""
    for part in _in_order(update.rows, update.events):
        if isinstance(part, Event):
            position = replace(position, seq=part.seq)
            yield position, message(part, event=part.type, id=str(position))
            continue
        for first in range(0, len(part), ROWS_PER_MESSAGE):
            rows = part[first : first + ROWS_PER_MESSAGE]
            position = replace(position, cursor=rows[-1]["cursor"])
            data = {"rows": [_without_cursor(row) for row in rows]}
            yield position, message(data, event="metrics", id=str(position))


def _in_order(
    rows: Sequence[Row], events: Sequence[Event]
) -> Iterator[Sequence[Row] | Event]:
    """Yields rows and events, whose numbers are independent, as they happened.

    What may come after something that was not read yet is left out, to be read again.
    """
    start = 0
    for event in events:
        end = start
        while end < len(rows) and _is_before(rows[end], event):
            end += 1
        if end > start:
            yield rows[start:end]
        start = end
        # Of more rows than are read at once, the next ones may come before it too.
        if len(rows) == MAX_ROWS and start == MAX_ROWS and _is_before(rows[-1], event):
            return
        yield event
    if len(events) < MAX_EVENTS and start < len(rows):
        yield rows[start:]


def _is_before(row: Row, event: Event) -> bool:
    """Whether a step came before an event."""
    if row["attempt"] != event.attempt:
        return bool(row["attempt"] < event.attempt)
    step = event.data.get("step")
    if event.type.startswith(_EVENTS_OF_STEPS) and isinstance(step, int):
        return bool(row["step"] <= step)
    return event.type in _EVENTS_AFTER_ALL_STEPS


def _end(status: str, position: Position) -> bytes:
    return message({"status": status}, event="end", id=str(position))


def _read_update(context: Context, job_id: str, position: Position) -> _Update:
    with context.store.read() as session:
        job = session.scalars(sa.select(JobRow).where(JobRow.id == job_id)).one()
        if job.deleted_at is not None:
            return _Update([], [], None)
        # One transaction for all three, so that the summary fits the events before it.
        rows = metrics.after(session, job, position.cursor, MAX_ROWS)
        statement = _events_after(job, position.seq).limit(MAX_EVENTS)
        events = render.events(job_id, session.scalars(statement))
        return _Update(rows, events, render.summaries(session, [job])[0])


def _without_cursor(row: dict[str, Any]) -> dict[str, Any]:
    # The cursor is part of the message's id and is not a metric.
    shown = dict(row)
    del shown["cursor"]
    return shown


def _events_after(job: JobRow, seq: int) -> sa.Select[EventRow]:
    return (
        sa.select(EventRow)
        .where(EventRow.job == job.number, EventRow.seq > seq)
        .order_by(EventRow.seq)
    )


def _is_after(
    job: JobRow, after: str, order: Literal["asc", "desc"]
) -> sa.ColumnElement[bool]:
    """Returns the condition for the events after the one named by its id or seq."""
    seq = after.removeprefix(f"{job.id}.")
    if not seq.isascii() or not seq.isdigit() or not 0 <= int(seq) <= job.last_seq:
        detail = f"after={after[:80]!r} is no event of {job.id}; use last_id of the previous page"
        raise RequestInvalidError.of_field("/query/after", "unknown_id", detail)
    if order == "desc":
        return EventRow.seq < int(seq)
    return EventRow.seq > int(seq)
