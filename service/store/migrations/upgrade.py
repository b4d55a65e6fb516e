"""Bringing a database up to date.

Owns: Alembic's configuration. Must not know: when that is due (`service.store.database`
decides).
"""

import importlib.resources

from alembic import command
from alembic.config import Config
from sqlalchemy.engine import Connection


def upgrade(connection: Connection) -> None:
    """Runs every migration that the database lacks, inside the caller's transaction."""
    command.upgrade(configuration(connection), "head")


def configuration(connection: Connection) -> Config:
    """Of Alembic's commands on this connection."""
    config = Config()
    config.set_main_option(
        "script_location",
        str(importlib.resources.files("service.store") / "migrations").replace("%", "%%"),
    )
    config.attributes["connection"] = connection
    return config
