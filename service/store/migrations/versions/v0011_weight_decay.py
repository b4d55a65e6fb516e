"""The weight decay of steps, where it varies."""

import sqlalchemy as sa
from alembic import op

revision: str = "0011"
down_revision: str | None = "0010"


def upgrade() -> None:
    """Adds the column; of steps stored before it is not known."""
    op.add_column("metrics", sa.Column("weight_decay", sa.Double(), nullable=True))


def downgrade() -> None:
    """Drops the column and what is in it."""
    with op.batch_alter_table("metrics") as table:
        table.drop_column("weight_decay")
