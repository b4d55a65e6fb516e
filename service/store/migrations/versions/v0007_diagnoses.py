"""What all ranks of a job did at one moment, and requests for it."""

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Makes the table and the counter; no job stored before was examined."""
    op.create_table(
        "diagnoses",
        sa.Column("job", KEY, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("report", sa.JSON(none_as_null=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["job"], ["jobs.number"], name=op.f("fk_diagnoses_job"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job", "seq", name=op.f("pk_diagnoses")),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "diagnosis_requests", sa.BigInteger(), nullable=False, server_default="0"
        ),
    )


def downgrade() -> None:
    """Drops both and what is in them."""
    op.drop_table("diagnoses")
    with op.batch_alter_table("jobs") as table:
        table.drop_column("diagnosis_requests")
