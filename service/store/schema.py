"""Defines the tables of the database.

Owns: names, types, keys. Must not know: who reads or writes them.

Times are seconds since the epoch and are shown to people only: what happened first follows
from `number`, `seq` and `step`. A change here needs a migration.
"""

from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Json = dict[str, Any]
REVISION = "0011"
"""The newest migration, after which a database has exactly these tables."""
BigKey = BigInteger().with_variant(Integer, "sqlite")
"""64 bits everywhere: SQLite gives rows a number only when the type is called INTEGER."""


class Table(DeclarativeBase):
    """Base of all tables; its constraints have names, so that migrations can change them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        int: BigInteger,
        Json: JSON(none_as_null=True),
        list[Any]: JSON,
    }


class DeploymentRow(Table):
    """The service's identity, in one row."""

    __tablename__ = "deployment"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    namespace: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]


class TokenRow(Table):
    """The SHA-256 of a bearer token, and what the token allows."""

    __tablename__ = "tokens"
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    scope: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[float]


class ClusterRow(Table):
    """A Ray cluster: its agent's last report, and the counter its long poll waits for."""

    __tablename__ = "clusters"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    revision: Mapped[int] = mapped_column(default=0)
    report: Mapped[Json | None]
    reported_at: Mapped[float | None]


class NodeExclusionRow(Table):
    """A node of a cluster on which no rank may start."""

    __tablename__ = "node_exclusions"
    cluster: Mapped[str] = mapped_column(String(64), primary_key=True)
    node_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    address: Mapped[str]
    reason: Mapped[str]
    since: Mapped[float]
    by: Mapped[str] = mapped_column(String(64))
    """Id of the job whose failure excluded it, or `admin`."""


class JobRow(Table):
    """A job: its spec, its desired state and its observed state."""

    __tablename__ = "jobs"
    # The queue and the agent's long poll ask for a cluster's jobs in some states.
    __table_args__ = (Index(None, "cluster", "status"),)
    number: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(32), unique=True)
    name: Mapped[str] = mapped_column(String(64))
    cluster: Mapped[str] = mapped_column(String(64))
    priority: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    ended_at: Mapped[float | None]
    deleted_at: Mapped[float | None]

    # Requested by the user.
    spec: Mapped[Json]
    resolved_spec: Mapped[Json]
    job_dir: Mapped[str]
    world_size: Mapped[int | None]
    """None until the cluster is known and the spec is resolved."""

    # Desired state, for the driver.
    desired: Mapped[str] = mapped_column(String(16))
    desired_revision: Mapped[int] = mapped_column(default=0)
    final_checkpoint: Mapped[bool] = mapped_column(default=True)
    checkpoint_requests: Mapped[int] = mapped_column(default=0)
    diagnosis_requests: Mapped[int] = mapped_column(default=0)
    profile_order: Mapped[Json | None]
    """The newest request of a profile: `workers.protocol.wire.ProfileOrder`."""
    pause_reason: Mapped[str | None] = mapped_column(String(32))
    """Why the job is paused or being paused; None: it is not."""
    resumes: Mapped[int] = mapped_column(default=0)
    """Number of times that the job was resumed after its end."""

    # Observed state.
    status: Mapped[str] = mapped_column(String(16))
    status_reason: Mapped[str | None] = mapped_column(String(32))
    message: Mapped[str] = mapped_column(default="")
    queue_number: Mapped[int | None]
    """Position in the queue: smaller was queued earlier."""
    epoch: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    preemptions: Mapped[int] = mapped_column(default=0)
    problem: Mapped[Json | None]
    prepared: Mapped[Json | None]
    progress: Mapped[Json] = mapped_column(default=dict)
    last_checkpoint: Mapped[Json | None]
    # Counters for the rows of events and metrics.
    last_seq: Mapped[int] = mapped_column(default=0)
    metrics_cursor: Mapped[int] = mapped_column(default=0)


def _job_key(**options: Any) -> Mapped[int]:
    # The number and not the id: it is an eighth of the size in every row of metrics.
    return mapped_column(
        BigKey, ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True, **options
    )


class LabelRow(Table):
    """One label of a job, for filtering."""

    __tablename__ = "job_labels"
    __table_args__ = (Index(None, "key", "value"),)
    job: Mapped[int] = _job_key()
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class SourceRow(Table):
    """The highest record number stored of one source of a job."""

    __tablename__ = "sources"
    job: Mapped[int] = _job_key()
    source: Mapped[str] = mapped_column(String(64), primary_key=True)
    stored: Mapped[int]


class EventRow(Table):
    """One event of a job's history; `seq` has no gaps, and each (source, n) is stored once."""

    __tablename__ = "events"
    # A record that is sent twice would break this constraint rather than the history.
    __table_args__ = (UniqueConstraint("job", "source", "n"),)
    job: Mapped[int] = _job_key()
    seq: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[str] = mapped_column(String(64))
    n: Mapped[int]
    attempt: Mapped[int]
    created_at: Mapped[float]
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(64))
    message: Mapped[str]
    data: Mapped[Json]
    ranks: Mapped[list[Any]]
    actor: Mapped[str] = mapped_column(String(16))


class MetricRow(Table):
    """The metrics of one step of one attempt.

    After `cursor` come the fields of `megatron_ray.reports.StepReport`, in its order.
    """

    __tablename__ = "metrics"
    # Without row ids SQLite stores rows in the order of the key, in which they are read.
    __table_args__ = (UniqueConstraint("job", "cursor"), {"sqlite_with_rowid": False})
    job: Mapped[int] = _job_key()
    step: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    cursor: Mapped[int]
    """Grows in the order of storing: a stream remembers the last one it has sent."""
    loss: Mapped[float | None]
    grad_norm: Mapped[float | None]
    lr: Mapped[float | None]
    num_tokens: Mapped[int | None]
    consumed_samples: Mapped[int | None]
    step_s: Mapped[float | None]
    tokens_per_s: Mapped[float | None]
    mfu: Mapped[float | None]
    memory_bytes: Mapped[int | None]
    split_s: Mapped[Json | None]
    other_losses: Mapped[Json | None]
    skipped_steps: Mapped[int | None]
    loss_scale: Mapped[float | None]
    weight_decay: Mapped[float | None]


class EvaluationRow(Table):
    """The loss over held-out samples after one step of one attempt, and by source.

    The last columns are the fields of `megatron_ray.reports.EvalReport`.
    """

    __tablename__ = "evaluations"
    job: Mapped[int] = _job_key()
    split: Mapped[str] = mapped_column(String(64), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    loss: Mapped[float | None]
    num_tokens: Mapped[int | None]
    source_losses: Mapped[Json] = mapped_column(default=dict)


class MonitorRow(Table):
    """What the callbacks of a job have measured in one step of one attempt.

    Apart from the metrics, whose rows are small: there may be thousands of numbers.
    """

    __tablename__ = "monitors"
    job: Mapped[int] = _job_key()
    step: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    numbers: Mapped[Json]
    """By name; null where one was not finite."""


class AttemptRow(Table):
    """One attempt to run a job, and where its ranks run."""

    __tablename__ = "attempts"
    job: Mapped[int] = _job_key()
    attempt: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(String(32))
    message: Mapped[str] = mapped_column(default="")
    world_size: Mapped[int | None]
    started_at: Mapped[float | None]
    ended_at: Mapped[float | None]
    ranks: Mapped[list[Any]] = mapped_column(default=list)


class DiagnosisRow(Table):
    """What all ranks of a job did at one moment; `seq` is that of its event."""

    __tablename__ = "diagnoses"
    job: Mapped[int] = _job_key()
    seq: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    created_at: Mapped[float]
    report: Mapped[Json]


class ProfileRow(Table):
    """Steps of an attempt that some ranks have profiled, or are to profile."""

    __tablename__ = "profiles"
    job: Mapped[int] = _job_key()
    attempt: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    """Counts the requests of the job; 0 for that of its spec."""
    first_step: Mapped[int]
    last_step: Mapped[int]
    ranks: Mapped[list[Any]]
    created_at: Mapped[float]
    reports: Mapped[Json]
    """What ranks have reported, by rank: `megatron_ray.reports.ProfileReport`."""


class CheckpointRow(Table):
    """One committed checkpoint; `deleted_at` is set once retention has removed it."""

    __tablename__ = "checkpoints"
    job: Mapped[int] = _job_key()
    path: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int]
    attempt: Mapped[int]
    bytes: Mapped[int | None]
    loss: Mapped[float | None]
    committed_at: Mapped[float]
    deleted_at: Mapped[float | None]


class IdempotencyRow(Table):
    """The response to a request with an Idempotency-Key."""

    __tablename__ = "idempotency"
    scope: Mapped[str] = mapped_column(primary_key=True)
    """Caller and path: equal keys of different callers never meet."""
    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    status: Mapped[int]
    body: Mapped[Json]
    created_at: Mapped[float]
