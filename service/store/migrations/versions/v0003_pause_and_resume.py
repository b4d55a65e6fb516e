"""Why a job is paused, and how often it was resumed after its end."""

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"


def upgrade() -> None:
    """Adds the columns; no job stored before is paused or was resumed."""
    op.add_column("jobs", sa.Column("pause_reason", sa.String(32), nullable=True))
    op.add_column(
        "jobs", sa.Column("resumes", sa.BigInteger(), nullable=False, server_default="0")
    )


def downgrade() -> None:
    """Drops the columns and what is in them."""
    with op.batch_alter_table("jobs") as table:
        table.drop_column("resumes")
        table.drop_column("pause_reason")
