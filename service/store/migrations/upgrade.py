"""Brings a database up to date.

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
    """Returns the configuration of Alembic's commands on a connection."""
    config = Config()
    folder = importlib.resources.files("service.store") / "migrations"
    # Alembic interpolates options, so a % in the path must be doubled.
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
