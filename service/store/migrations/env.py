"""Runs the migrations; loaded by Alembic.

They run on the connection that `service.store.database` passes in, inside its transaction.
"""

from alembic import context

from service.store.schema import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    # SQLite cannot alter a column: Alembic copies the table instead.
    render_as_batch=True,
)
context.run_migrations()
