"""Turns rows of the database into bodies of the public API.

Owns: which columns the API shows, and paging. Must not know: requests.

Texts and paths are redacted: earlier versions have stored URIs with secrets.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlencode

import sqlalchemy as sa
from sqlalchemy.orm import Session

from megatron_ray.config.schedules.batch_sizes import batch_sizes_of
from megatron_ray.exceptions import redacted
from service.api.clusters.bodies import (
    Cluster,
    Driver,
    Node,
    NodeExclusion,
    NodeGroup,
)
from service.api.models import (
    Attempt,
    Cancellation,
    Checkpoint,
    Event,
    Job,
    JobReference,
    JobSummary,
    LastCheckpoint,
    Page,
    Progress,
)
from service.exceptions import NotFoundError
from service.http.errors import problem_document
from service.jobs.agents import Agents
from service.jobs.queue import Cancelled
from service.jobs.reports.slow_ranks import SlowRank
from service.store import node_exclusions
from service.store.schema import (
    AttemptRow,
    CheckpointRow,
    ClusterRow,
    EventRow,
    JobRow,
    LabelRow,
)
from workers.protocol.events import EventLevel
from workers.protocol.states import AttemptState, DesiredState, JobState, StatusReason
from workers.protocol.wire import AgentReport, NodeInfo
from workers.protocol.wording import counted

Item = TypeVar("Item")
_DOCUMENT_MEMBERS = frozenset({"type", "title", "status", "detail", "code", "errors"})


def utc(seconds: float) -> datetime:
    """Returns seconds since the epoch as a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def utc_or_none(seconds: float | None) -> datetime | None:
    """Returns the same, or None for a time that is not set."""
    if seconds is None:
        return None
    return utc(seconds)


def page(
    items: Sequence[Item],
    id_of: Callable[[Item], object],
    *,
    total: int | None,
    has_more: bool = False,
) -> Page[Item]:
    """Returns one page of a list; `id_of` returns the id that `after` takes.

    `total` counts the entries of all pages; None where they are not counted.
    """
    if not items:
        return Page(data=[], has_more=has_more, total=total)
    return Page(
        data=list(items),
        first_id=str(id_of(items[0])),
        last_id=str(id_of(items[-1])),
        has_more=has_more,
        total=total,
    )


def no_attempt(attempt: int, newest: int) -> NotFoundError:
    """Returns the error for an attempt that a job has not had."""
    return NotFoundError.of_field(
        "/query/attempt",
        "no_attempt",
        f"no attempt {attempt}; the job has {counted(newest, 'attempt')}; leave attempt out for "
        "the newest",
    )


def summaries(session: Session, rows: Sequence[JobRow]) -> list[JobSummary]:
    """Returns jobs without their specs."""
    # One query for the labels of all jobs, not one per job.
    labels = _labels(session, rows)
    return [_summary(row, labels.get(row.number, {})) for row in rows]


def job(session: Session, row: JobRow) -> Job:
    """Returns a job with its specs."""
    # A job is its summary and the specs, which lists leave out because they are large.
    summary = summaries(session, [row])[0]
    # By attribute and not by model_dump, which would copy nested bodies to dictionaries.
    fields = {name: getattr(summary, name) for name in JobSummary.model_fields}
    return Job(
        **fields,
        spec=_shown_spec(row.spec),
        resolved_spec=_shown_spec(row.resolved_spec),
    )


def _shown_spec(spec: dict[str, Any]) -> dict[str, Any]:
    shown = {}
    for name, value in spec.items():
        # Labels are the user's own texts, and no paths.
        if name != "metadata":
            value = redacted_json(value)
        shown[name] = value
    return shown


def redacted_json(value: Any) -> Any:
    """Returns nested values whose texts have no secret of a URI in them."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {key: redacted_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted_json(item) for item in value]
    return value


def cancellation(
    result: Cancelled, job_ids: Iterable[str], *, has_more: bool
) -> Cancellation:
    """Returns what a request to cancel jobs has done; `job_ids` are those requested."""
    known = {job.id for job in (*result.cancelled, *result.ended)}
    return Cancellation(
        cancelled=[_reference(job) for job in result.cancelled],
        ended=[_reference(job) for job in result.ended],
        not_found=[job_id for job_id in dict.fromkeys(job_ids) if job_id not in known],
        has_more=has_more,
    )


def _reference(row: JobRow) -> JobReference:
    return JobReference(id=row.id, name=row.name, status=JobState(row.status))


def events(job_id: str, rows: Iterable[EventRow]) -> list[Event]:
    """Returns events of a job's history."""
    return [_event(job_id, row) for row in rows]


def _event(job_id: str, row: EventRow) -> Event:
    return Event(
        # Unique among all jobs, unlike seq.
        id=f"{job_id}.{row.seq}",
        seq=row.seq,
        job_id=job_id,
        attempt=row.attempt,
        created_at=utc(row.created_at),
        level=EventLevel(row.level),
        type=row.type,
        message=redacted(row.message),
        data=redacted_json(row.data),
        ranks=row.ranks,
        actor=row.actor,
    )


def attempt(row: AttemptRow) -> Attempt:
    """Returns one attempt."""
    return Attempt(
        attempt=row.attempt,
        state=AttemptState(row.state),
        reason=_reason(row.reason),
        message=redacted(row.message),
        world_size=row.world_size,
        started_at=utc_or_none(row.started_at),
        ended_at=utc_or_none(row.ended_at),
    )


def checkpoint(row: CheckpointRow) -> Checkpoint:
    """Returns one checkpoint."""
    return Checkpoint(
        step=row.step,
        attempt=row.attempt,
        path=redacted(row.path),
        committed_at=utc(row.committed_at),
        bytes=row.bytes,
        loss=row.loss,
    )


def ranks(rows: Sequence[Mapping[str, Any]], slow: Mapping[int, SlowRank]) -> list[Any]:
    """Returns a rank map as the driver reported it, with the ranks that are slow now."""
    if not slow:
        return list(rows)
    shown = []
    for row in rows:
        rank = slow.get(row.get("rank", -1))
        if rank is None:
            shown.append(row)
        else:
            state = {"ratio": rank.ratio, "since": utc(rank.since).isoformat()}
            shown.append({**row, "slow": state})
    return shown


def cluster(
    name: str,
    row: ClusterRow | None,
    agents: Agents,
    excluded: Sequence[node_exclusions.NodeExclusion],
) -> Cluster:
    """Returns a cluster; `row` is None, or without a report, before its agent's first."""
    entries = []
    for entry in excluded:
        shown = {"since": utc(entry.since), "reason": redacted(entry.reason)}
        entries.append(NodeExclusion(**{**asdict(entry), **shown}))
    return Cluster(
        name=name,
        live=agents.is_live(name),
        agent_silence_s=agents.silence_s(name),
        excluded_nodes=entries,
        **_reported(row),
    )


def _reported(row: ClusterRow | None) -> dict[str, Any]:
    """Returns the fields of a cluster that come from its agent's report."""
    names = ("agent_id", "code_version", "ray_version", "namespace", "dashboard_url")
    fields: dict[str, Any] = dict.fromkeys(names)
    # Configured clusters are listed even before their agents connect.
    if row is None or row.report is None:
        lists: dict[str, Any] = {"nodes": [], "node_groups": []}
        return {**fields, "reported_at": None, **lists, "drivers": [], "orphans": []}
    report = AgentReport.model_validate(row.report)
    for name in names:
        fields[name] = getattr(report, name)
    fields["reported_at"] = utc_or_none(row.reported_at)
    fields["nodes"] = [_node(node) for node in report.nodes]
    fields["node_groups"] = []
    for group in report.node_groups:
        fields["node_groups"].append(NodeGroup(**group.model_dump()))
    fields["drivers"] = [Driver(**driver.model_dump()) for driver in report.drivers]
    fields["orphans"] = list(report.orphans)
    return fields


def _node(node: NodeInfo) -> Node:
    deadline = utc_or_none(node.drain_deadline)
    fields = node.model_dump(exclude={"free"})
    return Node(**{**fields, "drain_deadline": deadline})


def dashboard_url(session: Session, cluster: str) -> str | None:
    """Returns the URL of the dashboard of a cluster's Ray, if it has one."""
    row = session.get(ClusterRow, cluster)
    if row is None or row.report is None:
        return None
    url: str | None = row.report.get("dashboard_url")
    return url


def with_log_urls(
    ranks: Sequence[Mapping[str, Any]], url: str, job_id: str, attempt: int
) -> list[dict[str, Any]]:
    """Returns an attempt's ranks with the pages of Ray's dashboard that have their logs."""
    rows = []
    for rank in ranks:
        number = int(rank.get("rank", 0))
        name = f"megatron-ray/{job_id}/attempt-{attempt:04d}/rank-{number:05d}.log"
        query = urlencode({"nodeId": rank.get("node_id"), "fileName": name})
        rows.append({**rank, "log_url": f"{url}/#/logs/viewer?{query}"})
    return rows


def _labels(session: Session, rows: Sequence[JobRow]) -> dict[int, dict[str, str]]:
    """Returns the labels of jobs, by the job's number."""
    numbers = [row.number for row in rows]
    statement = sa.select(LabelRow).where(LabelRow.job.in_(numbers)).order_by(LabelRow.key)
    # Jobs without labels have no entry.
    labels: dict[int, dict[str, str]] = {}
    for label in session.scalars(statement):
        labels.setdefault(label.job, {})[label.key] = label.value
    return labels


def _summary(row: JobRow, labels: dict[str, str]) -> JobSummary:
    return JobSummary(
        id=row.id,
        name=row.name,
        status=JobState(row.status),
        status_reason=_reason(row.status_reason),
        message=redacted(row.message),
        desired_state=DesiredState(row.desired),
        pause_reason=_pause_reason(row),
        resumes=row.resumes,
        cluster=row.cluster,
        priority=row.priority,
        metadata=labels,
        created_at=utc(row.created_at),
        started_at=utc_or_none(row.started_at),
        ended_at=utc_or_none(row.ended_at),
        attempt=row.attempt,
        failures=row.failures,
        preemptions=row.preemptions,
        progress=_progress(row),
        problem=_problem(row),
        storage_path=redacted(row.job_dir),
        last_checkpoint=_last_checkpoint(row),
    )


def _reason(stored: str | None) -> StatusReason | None:
    if stored is None:
        return None
    return StatusReason(stored)


def _pause_reason(row: JobRow) -> StatusReason | None:
    if row.pause_reason is None:
        return None
    return StatusReason(row.pause_reason)


def _problem(row: JobRow) -> dict[str, Any] | None:
    """Returns why a job failed, as a problem document."""
    stored = row.problem
    if stored is None:
        return None
    # Rows of earlier versions contain complete documents with old titles.
    extra = {name: stored[name] for name in stored if name not in _DOCUMENT_MEMBERS}
    errors = redacted_json(stored.get("errors", []))
    return problem_document(stored["code"], redacted(stored["detail"]), errors, **extra)


def _last_checkpoint(row: JobRow) -> LastCheckpoint | None:
    last = row.last_checkpoint
    if last is None:
        return None
    return LastCheckpoint(
        step=last["step"],
        path=redacted(last["path"]),
        committed_at=utc(last["committed_at"]),
    )


def _progress(row: JobRow) -> Progress:
    values = row.progress
    # From the last report, because the step may decrease after a resume.
    return Progress(
        step=values.get("step"),
        steps=_steps(row),
        loss=values.get("loss"),
        tokens_per_s=values.get("tokens_per_s"),
        eta_s=_eta_s(row),
        mfu=values.get("mfu"),
        val_loss=values.get("val_loss"),
        source_val_losses=values.get("source_val_losses") or {},
        unigram_nats=values.get("unigram_nats"),
    )


def _steps(row: JobRow) -> int | None:
    # Of a number of epochs it is known once the data are prepared.
    steps: int | None = row.resolved_spec["training"]["steps"]
    return steps


def _eta_s(row: JobRow) -> float | None:
    step = row.progress.get("step")
    step_s = row.progress.get("step_s")
    # The pace of the last steps predicts the end only while the job runs.
    steps = _steps(row)
    if row.status != JobState.RUNNING or steps is None:
        return None
    if step is None or step_s is None:
        return None
    sizes = batch_sizes_of(row.resolved_spec["training"])
    if sizes is None:
        return None
    # Later steps may have more samples than the last one.
    consumed = sizes.samples_after(step)
    remaining = max(0, sizes.samples_after(steps) - consumed)
    batch_size = sizes.at(sizes.samples_after(max(0, step - 1)))
    return remaining / batch_size * float(step_s)
