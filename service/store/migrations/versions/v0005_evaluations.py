"""Losses over held-out samples as rows, and by source."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Makes the table, with the evaluations that events tell of."""
    op.create_table(
        "evaluations",
        sa.Column("job", KEY, nullable=False),
        sa.Column("split", sa.String(length=64), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("num_tokens", sa.BigInteger(), nullable=True),
        sa.Column("source_losses", sa.JSON(none_as_null=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["job"], ["jobs.number"], name=op.f("fk_evaluations_job"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint(
            "job", "split", "step", "attempt", name=op.f("pk_evaluations")
        ),
    )
    rows = _evaluations_in_events()
    if rows:
        op.bulk_insert(_table(), rows)


def downgrade() -> None:
    """Drops the table; events still tell of its losses over all sources."""
    op.drop_table("evaluations")


def _table() -> sa.TableClause:
    return sa.table(
        "evaluations",
        sa.column("job", sa.BigInteger()),
        sa.column("split", sa.String()),
        sa.column("step", sa.BigInteger()),
        sa.column("attempt", sa.BigInteger()),
        sa.column("loss", sa.Double()),
        sa.column("num_tokens", sa.BigInteger()),
        sa.column("source_losses", sa.JSON()),
    )


def _evaluations_in_events() -> list[dict[str, Any]]:
    events = sa.table(
        "events",
        sa.column("job", sa.BigInteger()),
        sa.column("attempt", sa.BigInteger()),
        sa.column("type", sa.String()),
        sa.column("data", sa.JSON()),
    )
    statement = sa.select(events.c.job, events.c.attempt, events.c.data).where(
        events.c.type == "eval.completed"
    )
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for job, attempt, data in op.get_bind().execute(statement):
        step = data.get("step")
        split = data.get("split")
        if step is None or split is None:
            continue
        # An event may have been sent twice.
        rows[job, split, step, attempt] = {
            "job": job,
            "split": split,
            "step": step,
            "attempt": attempt,
            "loss": data.get("loss"),
            "num_tokens": data.get("num_tokens"),
            "source_losses": {},
        }
    return list(rows.values())
