"""What the callbacks of jobs have measured, by step."""

import sqlalchemy as sa
from alembic import op

revision: str = "0009"
down_revision: str | None = "0008"

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Makes the table; jobs stored before had no callbacks."""
    op.create_table(
        "monitors",
        sa.Column("job", KEY, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("numbers", sa.JSON(none_as_null=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["job"], ["jobs.number"], name=op.f("fk_monitors_job"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job", "step", "attempt", name=op.f("pk_monitors")),
    )


def downgrade() -> None:
    """Drops the table and what is in it."""
    op.drop_table("monitors")
