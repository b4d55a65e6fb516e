"""The loss scale of steps in fp16."""

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"


def upgrade() -> None:
    """Adds the column; steps stored before were not scaled."""
    op.add_column("metrics", sa.Column("loss_scale", sa.Double(), nullable=True))


def downgrade() -> None:
    """Drops the column and what is in it."""
    with op.batch_alter_table("metrics") as table:
        table.drop_column("loss_scale")
