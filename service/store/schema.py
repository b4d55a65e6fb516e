"""The tables.

Owns: names, types, keys. Must not know: who reads or writes them.

Times are seconds since the epoch, for people; order comes from `number`, `seq` and
`step`. A change here needs a migration.
"""

from typing import Any

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
REVISION = "0002"
"""The newest migration: a database that stands there has exactly these tables."""
BigKey = BigInteger().with_variant(Integer, "sqlite")
"""64 bits everywhere; SQLite numbers rows by itself only when the type is called
INTEGER."""


class Table(DeclarativeBase):
    """Base of all tables; constraints have names, so a migration can speak of them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {int: BigInteger, Json: JSON(none_as_null=True), list[Any]: JSON}


class DeploymentRow(Table):
    """One row: who this service is."""

    __tablename__ = "deployment"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    namespace: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]


class TokenRow(Table):
    """SHA-256 of a bearer token and what it may do."""

    __tablename__ = "tokens"
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    scope: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[float]


class ClusterRow(Table):
    """A Ray cluster: the agent's last words, and the counter that its long poll
    watches.
    """

    __tablename__ = "clusters"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    revision: Mapped[int] = mapped_column(default=0)
    report: Mapped[Json | None]
    reported_at: Mapped[float | None]


class JobRow(Table):
    """A job: what was asked, what is wanted, what was seen."""

    __tablename__ = "jobs"
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

    spec: Mapped[Json]
    resolved_spec: Mapped[Json]
    job_dir: Mapped[str]
    world_size: Mapped[int | None]
    """None until the cluster is known well enough to resolve the spec."""

    desired: Mapped[str] = mapped_column(String(16))
    desired_revision: Mapped[int] = mapped_column(default=0)
    final_checkpoint: Mapped[bool] = mapped_column(default=True)
    checkpoint_requests: Mapped[int] = mapped_column(default=0)

    status: Mapped[str] = mapped_column(String(16))
    status_reason: Mapped[str | None] = mapped_column(String(32))
    message: Mapped[str] = mapped_column(default="")
    queue_number: Mapped[int | None]
    """Place in the queue: grows in the order in which jobs became ready."""
    epoch: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    preemptions: Mapped[int] = mapped_column(default=0)
    problem: Mapped[Json | None]
    prepared: Mapped[Json | None]
    progress: Mapped[Json] = mapped_column(default=dict)
    last_checkpoint: Mapped[Json | None]
    last_seq: Mapped[int] = mapped_column(default=0)
    metrics_cursor: Mapped[int] = mapped_column(default=0)


def _job_key(**options: Any) -> Mapped[int]:
    return mapped_column(
        BigKey, ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True, **options
    )


class LabelRow(Table):
    """One entry of a job's metadata, for filtering."""

    __tablename__ = "job_labels"
    __table_args__ = (Index(None, "key", "value"),)
    job: Mapped[int] = _job_key()
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class SourceRow(Table):
    """Highest record number stored of one producer of one job."""

    __tablename__ = "sources"
    job: Mapped[int] = _job_key()
    source: Mapped[str] = mapped_column(String(64), primary_key=True)
    stored: Mapped[int]


class EventRow(Table):
    """One line of a job's history; seq is gap-free, (source, n) is there once."""

    __tablename__ = "events"
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
    """One step of one attempt."""

    __tablename__ = "metrics"
    __table_args__ = (UniqueConstraint("job", "cursor"), {"sqlite_with_rowid": False})
    job: Mapped[int] = _job_key()
    step: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    cursor: Mapped[int]
    """Grows in the order of storing; what a stream has seen."""
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


class AttemptRow(Table):
    """One rendezvous of one world, and who was in it."""

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


class CheckpointRow(Table):
    """One committed checkpoint; `deleted_at` once retention has removed it."""

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
    """What a POST with an Idempotency-Key was answered."""

    __tablename__ = "idempotency"
    scope: Mapped[str] = mapped_column(primary_key=True)
    """Token and route: keys of different callers never meet."""
    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    status: Mapped[int]
    body: Mapped[Json]
    created_at: Mapped[float]
