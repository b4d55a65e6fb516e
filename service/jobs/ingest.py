"""What drivers say.

Owns: fencing, numbering, and the meaning of each kind of record. Must not know: HTTP,
waiting.

A batch is applied as a whole or not at all; what was stored before is skipped, so
sending again is always safe.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy.orm import Session

from megatron_ray.config.problem import Problem
from service.http.errors import ProblemError, document
from service.jobs import lifecycle
from service.jobs.lifecycle import NewEvent
from service.jobs.spec_problems import pointer_to
from service.store import metrics
from service.store.database import Store, wake
from service.store.metrics import Finite, StepRow
from service.store.schema import AttemptRow, CheckpointRow, JobRow, SourceRow
from workers.protocol.states import AttemptState, JobState, StatusReason
from workers.protocol.wire import PROTOCOL, ProblemMessage, Record, RecordBatch

_SOURCE = re.compile(r"driver|a\d{1,9}/r\d{1,9}")
_SMOOTHING = 0.9
"""Weight of the past in the step time that ETA is computed from."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _State(_Data):
    state: JobState
    reason: StatusReason | None = None
    message: str = ""


class _Attempt(_Data):
    state: AttemptState
    reason: StatusReason | None = None
    message: str = ""
    world_size: int | None = Field(default=None, ge=1)


class _Event(_Data):
    type: str = Field(max_length=64, pattern=r"^[a-z][a-z0-9_]*(\.[a-z0-9_]+)+$")
    """Two words or more, so that it is never one of a stream's own (`metrics`, `state`,
    `end`)."""
    level: str = Field(default="info", pattern="^(info|warn|error)$")
    message: str = ""
    data: dict[str, Any] = Field(default_factory=dict)
    ranks: tuple[int, ...] = ()


class _Ranks(_Data):
    ranks: list[dict[str, Any]]


class _Checkpoint(_Data):
    action: str = Field(default="committed", pattern="^(committed|deleted)$")
    step: int = Field(ge=0)
    path: str = Field(min_length=1)
    bytes: int | None = None
    loss: Finite = None


class _Problems(_Data):
    problems: tuple[ProblemMessage, ...] = Field(min_length=1)


class _Eval(_Data):
    step: int
    split: str
    loss: Finite = None
    num_tokens: int | None = None


def apply(store: Store, session: Session, batch: RecordBatch) -> int:
    """Stores a batch; returns the highest number now stored of its source.

    Raises ProblemError: not_found, protocol_unsupported, fenced (a newer driver has
    spoken), gap, request_invalid.
    """
    check_protocol(batch.protocol)
    if not _SOURCE.fullmatch(batch.source):
        raise _bad(
            "/source",
            f"{batch.source[:80]!r} is no source; it is 'driver' or 'a<attempt>/r<rank>'",
        )
    job = lifecycle.lock(session, batch.job_id)
    take_epoch(job, batch.epoch)
    row = session.get(SourceRow, (job.number, batch.source))
    if row is None:
        row = SourceRow(job=job.number, source=batch.source, stored=0)
        session.add(row)
    new = [
        (index, record)
        for index, record in enumerate(batch.records)
        if record.n > row.stored
    ]
    for expected, (index, record) in enumerate(new, start=row.stored + 1):
        if record.n != expected:
            text = (
                f"record {index} of source {batch.source} has n={record.n}, but {row.stored} "
                "are stored"
            )
            text += f"; send from {row.stored + 1} on, without holes"
            raise ProblemError("gap", text, stored=row.stored)
    _Applier(store, session, job, batch.source).apply(new)
    row.stored += len(new)
    return row.stored


def check_protocol(protocol: int) -> None:
    """Raises ProblemError protocol_unsupported unless it is this version's or the one
    before.
    """
    if protocol not in (PROTOCOL, PROTOCOL - 1):
        text = (
            f"protocol {protocol} is not spoken here, {PROTOCOL} is; run the service and the "
            "workers in versions at most one apart"
        )
        raise ProblemError("protocol_unsupported", text, protocol=PROTOCOL)


def take_epoch(job: JobRow, epoch: int) -> None:
    """A higher epoch takes over. Raises ProblemError fenced for a lower one."""
    if epoch < max(job.epoch, 1):
        text = (
            f"epoch {epoch} is over, epoch {job.epoch} drives {job.id}; end without touching "
            "anything"
        )
        raise ProblemError("fenced", text, epoch=job.epoch)
    job.epoch = epoch


class _Applier:
    """One batch of one source."""

    def __init__(self, store: Store, session: Session, job: JobRow, source: str) -> None:
        self.store = store
        self.session = session
        self.job = job
        self.source = source
        self.steps: list[tuple[int, StepRow]] = []
        self.needs_admission = False
        self.kinds: dict[str, Callable[[Record], None]] = {
            "state": self._state,
            "event": self._event,
            "attempt": self._attempt,
            "ranks": self._ranks,
            "prepared": self._prepared,
            "checkpoint": self._checkpoint,
            "problem": self._problem,
            "step": self._step,
            "eval": self._eval,
        }

    def apply(self, records: Sequence[tuple[int, Record]]) -> None:
        for index, record in records:
            try:
                self.kinds.get(record.kind, self._unknown)(record)
            except ValidationError as error:
                first = error.errors()[0]
                where = pointer_to(["records", index, "data", *first["loc"]])
                raise _bad(
                    where, f"a record of kind {record.kind}: {first['msg']}"
                ) from error
        if self.steps:
            metrics.insert(self.store, self.session, self.job, self.steps)
            wake(self.session, lifecycle.job_topic(self.job.id))
        if self.needs_admission:
            self.session.flush()
            lifecycle.admit(
                self.session, lifecycle.lock_cluster(self.session, self.job.cluster)
            )

    def _fact(
        self,
        record: Record,
        type_: str,
        message: str = "",
        level: str = "info",
        data: dict[str, Any] | None = None,
    ) -> NewEvent:
        known = clean(record.data if data is None else data)
        return NewEvent(
            type_,
            message,
            level,
            known,
            source=self.source,
            n=record.n,
            attempt=record.attempt,
            at=record.at,
        )

    def _state(self, record: Record) -> None:
        given = _State.model_validate(record.data)
        # A recovery is told by attempt.failed and policy.decision, with its cause and
        # what follows.
        fact = self._fact(
            record,
            f"job.{given.state}",
            given.message,
            "error" if given.state is JobState.FAILED else "info",
        )
        if not lifecycle.transition(
            self.session, self.job, given.state, given.reason, fact
        ):
            return
        if given.state is JobState.FAILED:
            reason = given.reason or StatusReason.INTERNAL
            kind = "spec_invalid" if reason is StatusReason.SPEC_INVALID else "job_failed"
            self.job.problem = document(
                kind, given.message or f"the job failed: {reason}", reason=reason.value
            )
        self.needs_admission |= given.state.is_terminal or given.state is JobState.QUEUED

    def _event(self, record: Record) -> None:
        given = _Event.model_validate(record.data)
        fact = self._fact(record, given.type, given.message, given.level, given.data)
        lifecycle.add_event(
            self.session, self.job, NewEvent(**{**fact.__dict__, "ranks": given.ranks})
        )

    def _attempt(self, record: Record) -> None:
        given = _Attempt.model_validate(record.data)
        job = self.job
        row = self._attempt_row(record)
        ended = given.state not in (AttemptState.STARTING, AttemptState.RUNNING)
        if given.state is AttemptState.FAILED and row.state != AttemptState.FAILED:
            if given.reason is StatusReason.PREEMPTED:
                job.preemptions += 1
            else:
                job.failures += 1
        row.world_size = given.world_size or row.world_size
        if (
            ended or not JobState(job.status).is_terminal
        ):  # a late word does not open what the job's end has closed
            row.state = given.state
            row.reason = given.reason
            row.message = given.message
            row.ended_at = record.at if ended else None
        type_ = (
            "attempt.ended"
            if ended
            else f"attempt.{'started' if given.state is AttemptState.STARTING else 'running'}"
        )
        lifecycle.add_event(self.session, job, self._fact(record, type_, given.message))

    def _ranks(self, record: Record) -> None:
        given = _Ranks.model_validate(record.data)
        row = self._attempt_row(record)
        row.ranks = clean(sorted(given.ranks, key=lambda rank: int(rank.get("rank", 0))))
        nodes = len({rank.get("node_id") for rank in given.ranks})
        text = (
            f"{len(given.ranks)} rank{'s' * (len(given.ranks) != 1)} on {nodes} "
            f"node{'s' * (nodes != 1)}"
        )
        lifecycle.add_event(
            self.session,
            self.job,
            self._fact(
                record,
                "ranks.assigned",
                text,
                data={"ranks": len(given.ranks), "nodes": nodes},
            ),
        )

    def _prepared(self, record: Record) -> None:
        job = self.job
        job.prepared = clean(record.data)
        manifest = record.data.get("manifest")
        unigram = record.data.get(
            "unigram_nats",
            manifest.get("unigram_nats") if isinstance(manifest, dict) else None,
        )
        job.progress = {**job.progress, "unigram_nats": clean(unigram)}
        lifecycle.add_event(
            self.session, job, self._fact(record, "job.prepared", "the data are ready")
        )
        if job.status == JobState.PREPARING:
            lifecycle.transition(
                self.session,
                job,
                JobState.QUEUED,
                None,
                NewEvent("job.queued", "ready to run", at=record.at),
            )
            self.needs_admission = True

    def _checkpoint(self, record: Record) -> None:
        given = _Checkpoint.model_validate(record.data)
        job = self.job
        row = self.session.get(CheckpointRow, (job.number, given.path))
        if given.action == "deleted":
            if row is not None:
                row.deleted_at = record.at
        elif row is None:
            values = given.model_dump(exclude={"action"})
            row = CheckpointRow(
                job=job.number, attempt=record.attempt, committed_at=record.at, **values
            )
            self.session.add(row)
            job.last_checkpoint = {
                "step": given.step,
                "path": given.path,
                "committed_at": record.at,
            }
        else:
            row.deleted_at = None
        text = f"checkpoint of step {given.step} {given.action}"
        lifecycle.add_event(
            self.session, job, self._fact(record, f"checkpoint.{given.action}", text)
        )

    def _problem(self, record: Record) -> None:
        found = [
            Problem(item.pointer, item.code, item.detail)
            for item in _Problems.model_validate(record.data).problems
        ]
        lifecycle.fail(
            self.session,
            self.job,
            found,
            self._fact(record, "job.failed", found[0].detail, "error"),
        )
        self.needs_admission = True

    def _step(self, record: Record) -> None:
        row = StepRow.model_validate(record.data)
        progress = self.job.progress
        self.steps.append((record.attempt, row))
        self._see_attempt(record.attempt)
        if (record.attempt, row.step) <= (
            progress.get("attempt", 0),
            progress.get("step", -1),
        ):
            return
        past = progress.get("step_s")
        now = row.step_s
        smooth = (
            past
            if now is None
            else now
            if past is None
            else past * _SMOOTHING + now * (1 - _SMOOTHING)
        )
        seen = {
            "attempt": record.attempt,
            "step": row.step,
            "loss": row.loss,
            "tokens_per_s": row.tokens_per_s,
            "mfu": row.mfu,
        }
        self.job.progress = {**progress, **seen, "step_s": smooth}

    def _eval(self, record: Record) -> None:
        given = _Eval.model_validate(record.data)
        if given.split == "validation":
            self.job.progress = {
                **self.job.progress,
                "val_loss": given.loss,
                "val_step": given.step,
            }
        text = (
            f"{given.split} loss at step {given.step}: "
            f"{'not finite' if given.loss is None else format(given.loss, '.4f')}"
        )
        lifecycle.add_event(
            self.session, self.job, self._fact(record, "eval.completed", text)
        )

    def _unknown(self, record: Record) -> None:
        """A newer worker's news: kept as it came."""
        lifecycle.add_event(
            self.session, self.job, self._fact(record, f"record.{record.kind[:50]}")
        )

    def _attempt_row(self, record: Record) -> AttemptRow:
        row = self.session.get(AttemptRow, (self.job.number, record.attempt))
        if row is None:
            over = JobState(self.job.status).is_terminal
            row = AttemptRow(
                job=self.job.number,
                attempt=record.attempt,
                message="",
                started_at=record.at,
                ranks=[],
            )
            row.state, row.ended_at = (
                (AttemptState.STOPPED, record.at) if over else (AttemptState.STARTING, None)
            )
            self.session.add(row)
            self.session.flush()
        self._see_attempt(record.attempt)
        return row

    def _see_attempt(self, attempt: int) -> None:
        self.job.attempt = max(self.job.attempt, attempt)


def stored(session: Session, job: JobRow) -> dict[str, int]:
    """Highest number stored of each source."""
    return {
        row.source: row.stored
        for row in session.scalars(sa.select(SourceRow).where(SourceRow.job == job.number))
    }


def clean(value: Any) -> Any:
    """JSON without what JSON lacks: numbers that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list | tuple) else value


def _bad(pointer: str, detail: str) -> ProblemError:
    return ProblemError(
        "request_invalid", detail, errors=[Problem(pointer, "record_invalid", detail)]
    )
