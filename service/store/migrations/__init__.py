"""Alembic migrations, run at start-up by `service.store.database`."""
