"""Applies a driver's records to its job.

Owns: the meaning of each kind of record. Must not know: HTTP, numbering of records
(`service.jobs.ingest`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy.orm import Session

from megatron_ray.config.errors.messages import plain_message
from megatron_ray.config.errors.spec_problems import pointer_to
from megatron_ray.config.problem import Problem
from service.exceptions import RequestInvalidError
from service.jobs import lifecycle, queue
from service.jobs.lifecycle import NewEvent
from service.jobs.reports import diagnoses, profiles
from service.store import evaluations, metrics, monitors, node_exclusions
from service.store.database import Store, wake
from service.store.evaluations import parse_evaluation
from service.store.metrics import Finite, StepRow
from service.store.schema import AttemptRow, CheckpointRow, JobRow
from workers.protocol.events import EventType
from workers.protocol.states import AttemptState, JobState, StatusReason
from workers.protocol.wire import Record
from workers.protocol.wording import counted

_SMOOTHING = 0.9
"""Weight of the past in the step time that the ETA is computed from."""
_MAX_KIND_CHARS = 50
_MAX_NOTES = 50
_MAX_NOTE_CHARS = 2000


class _Data(BaseModel):
    """Base of the data of a record; fields of a newer driver are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _StateData(_Data):
    state: JobState
    reason: StatusReason | None = None
    message: str = ""


class _AttemptData(_Data):
    state: AttemptState
    reason: StatusReason | None = None
    message: str = ""
    world_size: int | None = Field(default=None, ge=1)


class _EventData(_Data):
    type: str = Field(max_length=64, pattern=r"^[a-z][a-z0-9_]*(\.[a-z0-9_]+)+$")
    """At least two words, so that it never equals one of a stream's own event names
    (`metrics`, `state`, `end`)."""
    level: str = Field(default="info", pattern="^(info|warn|error)$")
    message: str = ""
    data: dict[str, Any] = Field(default_factory=dict)
    ranks: tuple[int, ...] = ()


class _RanksData(_Data):
    ranks: list[dict[str, Any]]


class _CheckpointData(_Data):
    action: str = Field(default="committed", pattern="^(committed|deleted)$")
    step: int = Field(ge=0)
    path: str = Field(min_length=1)
    bytes: int | None = None
    loss: Finite = None


class _ProblemData(_Data):
    problems: tuple[Problem, ...] = Field(min_length=1)


class _CorpusData(_Data):
    num_tokens: int
    num_documents: int


class _ManifestData(_Data):
    train: tuple[_CorpusData, ...]
    validation: tuple[_CorpusData, ...]
    vocab_size: int


class RecordApplier:
    """Applies the records of one batch, all from one source."""

    def __init__(self, store: Store, session: Session, job: JobRow, source: str) -> None:
        self._store = store
        self._session = session
        self._job = job
        self._source = source
        self._steps: list[tuple[int, StepRow]] = []
        """(attempt, row), inserted together at the end of the batch."""
        self._needs_admission = False
        """Whether a record has freed resources or queued the job."""
        self._handlers: dict[str, Callable[[Record], None]] = {
            "state": self._apply_state,
            "event": self._apply_event,
            "attempt": self._apply_attempt,
            "ranks": self._apply_ranks,
            "prepared": self._apply_prepared,
            "checkpoint": self._apply_checkpoint,
            "problem": self._apply_problem,
            "diagnosis": lambda record: diagnoses.apply(session, job, source, record),
            "profile": lambda record: profiles.apply(session, job, source, record),
            "step": self._apply_step,
            "eval": self._apply_eval,
            "monitors": self._apply_monitors,
        }

    def apply(self, records: Sequence[tuple[int, Record]]) -> None:
        """Applies records, each with its index in the batch as it was sent.

        Raises RequestInvalidError for a record whose data do not fit its kind.
        """
        for index, record in records:
            handler = self._handlers.get(record.kind, self._keep_unknown)
            try:
                handler(record)
            except ValidationError as error:
                raise _invalid_record(index, record, error) from error
        if self._steps:
            # Steps have no events, so the job's streams must be woken here.
            metrics.insert(self._store, self._session, self._job, self._steps)
            wake(self._session, lifecycle.job_topic(self._job.id))
        if self._needs_admission:
            # Once per batch, after all of its records have been applied.
            self._session.flush()
            cluster = lifecycle.lock_cluster(self._session, self._job.cluster)
            queue.admit_jobs(self._session, cluster)

    # ---- kinds of records

    def _apply_state(self, record: Record) -> None:
        data = _StateData.model_validate(record.data)
        reason = data.reason
        # The driver carries out a pause without knowing who has requested it.
        if data.state is JobState.PAUSED and self._job.pause_reason is not None:
            reason = StatusReason(self._job.pause_reason)
        has_failed = data.state is JobState.FAILED
        # Recoveries are info: attempt.failed and policy.decision say why they happened.
        event = self._event(record, f"job.{data.state}", data.message)
        if has_failed:
            event = dataclasses.replace(event, level="error")
        if data.state is JobState.QUEUED:
            queue.note_missing_nodes(self._session, self._job)
        # A state that may not follow is kept as an event and changes nothing.
        if not lifecycle.transition(self._session, self._job, data.state, reason, event):
            return
        if has_failed:
            self._job.problem = _failure(reason or StatusReason.INTERNAL, data.message)
        if data.state.is_terminal or data.state in (JobState.QUEUED, JobState.PAUSED):
            self._needs_admission = True

    def _apply_event(self, record: Record) -> None:
        data = _EventData.model_validate(record.data)
        event = self._event(record, data.type, data.message, data.data)
        self._add(dataclasses.replace(event, level=data.level, ranks=data.ranks))
        if data.type == EventType.NODE_EXCLUDED:
            self._exclude_node(data.data)

    def _exclude_node(self, data: dict[str, Any]) -> None:
        """Keeps other jobs from a node on which this one has failed."""
        cluster = lifecycle.lock_cluster(self._session, self._job.cluster)
        if node_exclusions.exclude_for_job(self._session, cluster, self._job.id, data):
            # The agent passes the list on to the drivers.
            lifecycle.raise_revision(self._session, cluster.name)

    def _apply_attempt(self, record: Record) -> None:
        data = _AttemptData.model_validate(record.data)
        row = self._attempt_row(record)
        has_ended = data.state not in (AttemptState.STARTING, AttemptState.RUNNING)
        # A restarted driver may report the same failure again: it is counted once.
        if data.state is AttemptState.FAILED and row.state != AttemptState.FAILED:
            self._count_failure(data.reason)
        row.world_size = data.world_size or row.world_size
        # A late record must not reopen an attempt that was closed with the job.
        if has_ended or not JobState(self._job.status).is_terminal:
            row.state = data.state
            row.reason = data.reason
            row.message = data.message
            row.ended_at = None
            if has_ended:
                row.ended_at = record.at
        event_type = "attempt.ended"
        if data.state is AttemptState.STARTING:
            event_type = "attempt.started"
        elif data.state is AttemptState.RUNNING:
            event_type = "attempt.running"
        self._add(self._event(record, event_type, data.message))

    def _count_failure(self, reason: StatusReason | None) -> None:
        # Preemptions have a budget of their own: they say nothing against the job.
        if reason is StatusReason.PREEMPTED:
            self._job.preemptions += 1
        # Nor does a bad node that was measured before training.
        elif reason is not StatusReason.BAD_NODES:
            self._job.failures += 1

    def _apply_ranks(self, record: Record) -> None:
        data = _RanksData.model_validate(record.data)
        row = self._attempt_row(record)
        # Ordered by rank: the driver reports in the order in which workers answered.
        row.ranks = finite(sorted(data.ranks, key=lambda rank: int(rank.get("rank", 0))))
        num_ranks = len(data.ranks)
        node_ids = set()
        for rank in data.ranks:
            node_ids.add(rank.get("node_id"))
        num_nodes = len(node_ids)
        message = f"{counted(num_ranks, 'rank')} on {counted(num_nodes, 'node')}"
        counts = {"ranks": num_ranks, "nodes": num_nodes}
        self._add(self._event(record, "ranks.assigned", message, counts))

    def _apply_prepared(self, record: Record) -> None:
        job = self._job
        manifest = record.data.get("manifest")
        if not isinstance(manifest, dict):
            manifest = {}
        # A driver may send it inside the manifest only.
        unigram_nats = record.data.get("unigram_nats", manifest.get("unigram_nats"))
        job.prepared = finite(record.data)
        job.progress = {**job.progress, "unigram_nats": finite(unigram_nats)}
        num_steps = record.data.get("steps")
        if isinstance(num_steps, int):
            job.resolved_spec = _with_steps(job.resolved_spec, num_steps)
        message = _prepared_message(manifest)
        self._add(self._event(record, "job.prepared", message))
        for note in _notes(manifest):
            # Not numbered: the record already has an event with its number.
            self._add(NewEvent("data.note", note, at=record.at))
        first_document = manifest.get("first_document")
        if isinstance(first_document, str) and first_document:
            self._add(NewEvent("data.first_document", first_document, at=record.at))
        # A restarted driver reports it again: only the first time does it queue the job.
        if job.status == JobState.PREPARING:
            queued = NewEvent("job.queued", "ready to run", at=record.at)
            lifecycle.transition(self._session, job, JobState.QUEUED, None, queued)
            self._needs_admission = True

    def _apply_checkpoint(self, record: Record) -> None:
        data = _CheckpointData.model_validate(record.data)
        job = self._job
        row = self._session.get(CheckpointRow, (job.number, data.path))
        if data.action == "deleted":
            if row is not None:
                row.deleted_at = record.at
        elif row is not None:
            # Committed again at the same path, after a restart from an earlier step.
            row.deleted_at = None
        else:
            row = CheckpointRow(job=job.number, path=data.path, step=data.step)
            row.attempt = record.attempt
            row.bytes = data.bytes
            row.loss = data.loss
            row.committed_at = record.at
            self._session.add(row)
            job.last_checkpoint = {
                "step": data.step,
                "path": data.path,
                "committed_at": record.at,
            }
        message = f"checkpoint of step {data.step} {data.action}"
        self._add(self._event(record, f"checkpoint.{data.action}", message))

    def _apply_problem(self, record: Record) -> None:
        problems = list(_ProblemData.model_validate(record.data).problems)
        event = self._event(record, "job.failed", problems[0].detail)
        event = dataclasses.replace(event, level="error")
        # Not an attempt's failure: the spec is wrong, so no attempt will be made.
        lifecycle.fail(self._session, self._job, problems, event)
        self._needs_admission = True

    def _apply_step(self, record: Record) -> None:
        row = metrics.parse_step(record.data)
        self._steps.append((record.attempt, row))
        self._raise_attempt(record.attempt)
        progress = self._job.progress
        newest = (progress.get("attempt", 0), progress.get("step", -1))
        # Late rows of an earlier attempt are stored but do not change the progress.
        if (record.attempt, row.step) <= newest:
            return
        self._job.progress = {
            **progress,
            "attempt": record.attempt,
            "step": row.step,
            "loss": row.values["loss"],
            "tokens_per_s": row.values["tokens_per_s"],
            "mfu": row.values["mfu"],
            "step_s": _smoothed(progress.get("step_s"), row.values["step_s"]),
        }

    def _apply_eval(self, record: Record) -> None:
        evaluation = parse_evaluation(record.data)
        self._raise_attempt(record.attempt)
        evaluations.insert(
            self._store, self._session, self._job, record.attempt, evaluation
        )
        # Other splits are in the history and not in the progress.
        if evaluation.split == evaluations.VALIDATION:
            result = {
                "val_loss": evaluation.loss,
                "val_step": evaluation.step,
                "source_val_losses": evaluation.source_losses,
            }
            self._job.progress = {**self._job.progress, **result}
        self._add(self._event(record, "eval.completed", evaluation.sentence()))

    def _apply_monitors(self, record: Record) -> None:
        monitored = monitors.parse_monitors(record.data)
        self._raise_attempt(record.attempt)
        monitors.insert(self._store, self._session, self._job, record.attempt, monitored)

    def _keep_unknown(self, record: Record) -> None:
        """Stores a record of an unknown kind, sent by a newer driver."""
        self._add(self._event(record, f"record.{record.kind[:_MAX_KIND_CHARS]}"))

    # ---- parts of all kinds

    def _event(
        self,
        record: Record,
        event_type: str,
        message: str = "",
        data: dict[str, Any] | None = None,
    ) -> NewEvent:
        """Returns the event of a record; `data` replaces the record's own."""
        if data is None:
            data = record.data
        return NewEvent(
            event_type,
            message,
            data=finite(data),
            source=self._source,
            n=record.n,
            attempt=record.attempt,
            at=record.at,
        )

    def _add(self, event: NewEvent) -> None:
        lifecycle.add_event(self._session, self._job, event)

    def _attempt_row(self, record: Record) -> AttemptRow:
        """Returns the row of a record's attempt, which is made on first use."""
        row = self._session.get(AttemptRow, (self._job.number, record.attempt))
        if row is None:
            row = AttemptRow(job=self._job.number, attempt=record.attempt, message="")
            row.started_at = record.at
            row.ranks = []
            row.state = AttemptState.STARTING
            if JobState(self._job.status).is_terminal:
                # Closed at once if reported after the job's end, since nothing else would
                # close it.
                row.state = AttemptState.STOPPED
                row.ended_at = record.at
            self._session.add(row)
            self._session.flush()
        self._raise_attempt(record.attempt)
        return row

    def _raise_attempt(self, attempt: int) -> None:
        self._job.attempt = max(self._job.attempt, attempt)


def finite(value: Any) -> Any:
    """Returns JSON in which numbers that are not finite, which JSON lacks, are null."""
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _invalid_record(
    index: int, record: Record, error: ValidationError
) -> RequestInvalidError:
    first = error.errors()[0]
    pointer = pointer_to(["records", index, "data", *first["loc"]])
    field_name = pointer_to(first["loc"])[1:]
    detail = f"a record of kind {record.kind}: {field_name} {plain_message(first)}"
    return RequestInvalidError.of_field(pointer, "record_invalid", detail)


def _failure(reason: StatusReason, message: str) -> dict[str, Any]:
    code = "job_failed"
    if reason is StatusReason.SPEC_INVALID:
        code = "spec_invalid"
    detail = message or f"the job failed: {reason.value}"
    return lifecycle.stored_problem(code, detail, reason=reason.value)


def _smoothed(past: float | None, newest: float | None) -> float | None:
    # One slow step, such as one that writes a checkpoint, must not make the ETA jump.
    if newest is None:
        return past
    if past is None:
        return newest
    return past * _SMOOTHING + newest * (1 - _SMOOTHING)


def _with_steps(spec: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """Returns a resolved spec with the steps of its number of epochs."""
    length = {"steps": num_steps, "epochs": None, "tokens": None}
    return {**spec, "training": {**spec["training"], **length}}


def _prepared_message(manifest: dict[str, Any]) -> str:
    try:
        data = _ManifestData.model_validate(manifest)
    except ValidationError:
        # A driver of another version may send other fields.
        return "data ready"
    # A job that only measures its nodes.
    if not data.train:
        return "no data are needed"
    parts = []
    for split, corpora in (("training", data.train), ("validation", data.validation)):
        num_tokens = sum(corpus.num_tokens for corpus in corpora)
        num_documents = sum(corpus.num_documents for corpus in corpora)
        documents = counted(num_documents, "document")
        parts.append(f"{num_tokens:,} {split} tokens in {documents}")
    return f"data ready: {', '.join(parts)}, vocabulary {data.vocab_size:,}"


def _notes(manifest: dict[str, Any]) -> list[str]:
    """Returns what the preparation reports about the data, one sentence each."""
    notes = manifest.get("notes")
    if not isinstance(notes, list | tuple):
        return []
    sentences = [str(note)[:_MAX_NOTE_CHARS] for note in notes[:_MAX_NOTES]]
    if len(notes) > _MAX_NOTES:
        sentences.append(f"and {len(notes) - _MAX_NOTES} more notes on the data")
    return sentences
