"""Alembic's entry: runs the migrations on the connection that `service.store.database`
hands over, inside its transaction.
"""

from alembic import context

from service.store.schema import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,
)
context.run_migrations()
