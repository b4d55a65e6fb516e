"""Steps of a job that some of its ranks have profiled."""

import sqlalchemy as sa
from alembic import op

revision: str = "0010"
down_revision: str | None = "0009"

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Makes the table and the column; no job stored before was profiled."""
    op.create_table(
        "profiles",
        sa.Column("job", KEY, nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("ranks", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("reports", sa.JSON(none_as_null=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["job"], ["jobs.number"], name=op.f("fk_profiles_job"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job", "attempt", "number", name=op.f("pk_profiles")),
    )
    op.add_column(
        "jobs", sa.Column("profile_order", sa.JSON(none_as_null=True), nullable=True)
    )


def downgrade() -> None:
    """Drops both and what is in them."""
    op.drop_table("profiles")
    with op.batch_alter_table("jobs") as table:
        table.drop_column("profile_order")
