"""Nodes on which no rank may start."""

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"


def upgrade() -> None:
    """Makes the table; no node was excluded before."""
    op.create_table(
        "node_exclusions",
        sa.Column("cluster", sa.String(length=64), nullable=False),
        sa.Column("node_id", sa.String(length=64), nullable=False),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
        sa.Column("by", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("cluster", "node_id", name=op.f("pk_node_exclusions")),
    )


def downgrade() -> None:
    """Drops the table and what is in it."""
    op.drop_table("node_exclusions")
