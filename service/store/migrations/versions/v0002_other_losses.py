"""Losses that are trained on beside the model's own, of each step."""

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"


def upgrade() -> None:
    """Adds the column; steps stored before have nothing in it."""
    op.add_column(
        "metrics", sa.Column("other_losses", sa.JSON(none_as_null=True), nullable=True)
    )


def downgrade() -> None:
    """Drops the column and what is in it."""
    with op.batch_alter_table("metrics") as table:
        table.drop_column("other_losses")
