"""The database as a thing to open, read and write.

Owns: engine, transactions, migration at start. Must not know: jobs' meaning.

SQLite in WAL mode by default: readers never wait, one writer at a time, every commit is
on disk before it is answered. On Postgres writers take turns too, those of other
services included, by one advisory lock: what a transaction has read does not change
until it commits, and nothing above has to think of two that insert the same row.
Transactions are short and few (records come in batches).
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session

from service.settings import SettingsError
from service.store.schema import REVISION, DeploymentRow

BUSY_TIMEOUT_S = 30
WRITE_LOCK = 0x6D_65_67_61
"""Any fixed number."""

Notify = Callable[..., None]
WAKE = "wake"


def wake(session: Session, *topics: str) -> None:
    """Asks for the topics' waiters to be woken once the transaction is committed."""
    session.info.setdefault(WAKE, set()).update(topics)


class Store:
    """An open database.

    Every method blocks: call it from a worker thread, never on the event loop.
    """

    def __init__(self, engine: Engine, notify: Notify) -> None:
        self._engine = engine
        self._notify = notify
        self._writing = engine.execution_options(megatron_ray_write=True)
        self._lock = (
            threading.Lock()
            if engine.dialect.name == "sqlite"
            else contextlib.nullcontext()
        )

    @classmethod
    def open(cls, url: str, notify: Notify = lambda *_: None) -> "Store":
        """Opens and migrates; `notify` hears the topics of `wake` after each commit.

        Raises SettingsError for a URL that cannot be used, sqlalchemy's errors for a
        broken database.
        """
        try:
            parsed = sa.make_url(url)
            if parsed.get_backend_name() == "sqlite":
                engine = _sqlite_engine(parsed)
            elif parsed.get_backend_name() == "postgresql":
                engine = _postgresql_engine(parsed)
            else:
                raise sa.exc.ArgumentError(
                    f"{parsed.get_backend_name()} is not spoken here"
                )
        except (
            sa.exc.ArgumentError,
            sa.exc.NoSuchModuleError,
            ModuleNotFoundError,
        ) as error:
            ways = (
                "give sqlite:///<path>, or postgresql+psycopg://... with `pip install "
                "'megatron-ray[postgres]'`"
            )
            raise SettingsError(
                f"MEGATRON_RAY_DATABASE_URL cannot be used: {error}; {ways}"
            ) from error
        store = cls(engine, notify)
        store._migrate()
        return store

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent view of the database; changes nothing."""
        with Session(self._engine) as session:
            yield session

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction: all of the block or, on any exception, nothing."""
        with (
            self._lock,
            Session(self._writing, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session
        self._notify(*sorted(session.info.get(WAKE, ())))

    def insert_or_ignore(
        self, session: Session, table: sa.Table, rows: list[dict[str, Any]]
    ) -> int:
        """Inserts rows whose key is not there yet; returns how many were."""
        if not rows:
            return 0
        statement = (
            _sqlite_insert(table)
            if self._engine.dialect.name == "sqlite"
            else _postgresql_insert(table)
        )
        return session.connection().execute(statement, rows).rowcount

    def deployment(self) -> DeploymentRow:
        """Who this service is; made on first use and the same ever after."""
        with self.write() as session:
            found = session.scalars(sa.select(DeploymentRow)).first()
            if found is None:
                name = secrets.token_hex(4)
                found = DeploymentRow(
                    id=name, namespace=f"megatron-ray-{name}", created_at=time.time()
                )
                session.add(found)
            return found

    def ping(self) -> None:
        """Raises sqlalchemy.exc.SQLAlchemyError when the database does not answer."""
        with self.read() as session:
            session.execute(sa.text("SELECT 1"))

    def close(self) -> None:
        """Gives all connections back."""
        self._engine.dispose()

    def _migrate(self) -> None:
        with self._lock, self._writing.begin() as connection:
            if _revision(connection) != REVISION:
                # Imported here because Alembic takes a fifth of a start, and nearly
                # every start finds nothing to do.
                from service.store.migrations.upgrade import upgrade

                upgrade(connection)


def _revision(connection: Connection) -> str | None:
    """The migration that the database stands at; None for a new one."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.scalar(
        sa.text("SELECT version_num FROM alembic_version")
    )
    return found


def _sqlite_insert(table: sa.Table) -> sa.Insert:
    from sqlalchemy.dialects.sqlite import insert

    return insert(table).on_conflict_do_nothing()


def _postgresql_insert(table: sa.Table) -> sa.Insert:
    from sqlalchemy.dialects.postgresql import (
        insert,
    )  # only where it is spoken: it loads every driver's dialect

    return insert(table).on_conflict_do_nothing()


def _sqlite_engine(url: sa.URL) -> Engine:
    if url.database in (None, "", ":memory:"):
        raise SettingsError(
            "MEGATRON_RAY_DATABASE_URL: SQLite needs a file, sqlite:///<path>; in memory "
            "nothing survives a restart"
        )
    Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(
        url,
        pool_size=20,
        max_overflow=30,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
    )
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _postgresql_engine(url: sa.URL) -> Engine:
    engine = sa.create_engine(url, pool_size=20, max_overflow=30, pool_pre_ping=True)
    sa.event.listen(engine, "begin", _begin_postgresql)
    sa.event.listen(engine, "before_cursor_execute", _without_nul, retval=True)
    return engine


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("megatron_ray_write"):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITE_LOCK})")


def _without_nul(
    _connection: Any,
    _cursor: Any,
    statement: str,
    parameters: Any,
    _context: Any,
    _many: bool,
) -> tuple[str, Any]:
    """Postgres' texts have no NUL: one in an address finds nothing, one in a rank's
    last words is shown as a mark.
    """
    return statement, _replaced(parameters)


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in value else value
    if isinstance(value, dict):
        return {name: _replaced(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(part) for part in value)
    return value


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = (
        None  # the driver must not open transactions by itself: `_begin_sqlite` does
    )
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_TIMEOUT_S * 1000}",
        "temp_store=MEMORY",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes its lock first: a reader that turns into a writer half-way would
    # fail with "database is locked".
    connection.exec_driver_sql(
        "BEGIN IMMEDIATE"
        if connection.get_execution_options().get("megatron_ray_write")
        else "BEGIN"
    )
