"""Number of skipped steps, with each step."""

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"


def upgrade() -> None:
    """Adds the column; steps stored before have nothing in it."""
    op.add_column("metrics", sa.Column("skipped_steps", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    """Drops the column and what is in it."""
    with op.batch_alter_table("metrics") as table:
        table.drop_column("skipped_steps")
