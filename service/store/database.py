"""Opens the database and runs transactions in it.

Owns: engine, transactions, migration at start. Must not know: jobs.

SQLite in WAL mode by default: readers never wait, there is one writer at a time, and every
commit is on disk before it is answered. On Postgres writers take turns too, those of other
services included, by one advisory lock: what a transaction has read does not change until
it commits, so no caller has to think of two that insert the same row. Transactions are
short and few, because records come in batches.
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
"""Key of the advisory lock: any fixed number."""
WAKE = "wake"
"""Entry of `Session.info` that holds the topics to notify."""
_WRITES = "megatron_ray_write"
"""Execution option of connections that write."""
_SQLITE_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "foreign_keys=ON",
    f"busy_timeout={BUSY_TIMEOUT_S * 1000}",
    "temp_store=MEMORY",
)
Notify = Callable[..., None]


def wake(session: Session, *topics: str) -> None:
    """Notifies the topics' waiters once the transaction is committed."""
    session.info.setdefault(WAKE, set()).update(topics)


def _notify_no_one(*topics: str) -> None:
    """Stands for a notifier where nothing waits."""


class Store:
    """An open database.

    Every method blocks: call it from a worker thread, never on the event loop.
    """

    def __init__(self, engine: Engine, notify: Notify) -> None:
        self._engine = engine
        self._notify = notify
        self._write_engine = engine.execution_options(**{_WRITES: True})
        self._lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if engine.dialect.name == "sqlite":
            # Threads of this process wait for this lock, because SQLite's busy handler
            # polls.
            self._lock = threading.Lock()

    @classmethod
    def open(cls, url: str, notify: Notify = _notify_no_one) -> "Store":
        """Opens and migrates a database.

        `notify` is called after each commit with the topics given to `wake`. Raises
        SettingsError for a URL that cannot be used, sqlalchemy's errors for a broken
        database.
        """
        try:
            engine = _engine(sa.make_url(url))
        except (
            sa.exc.ArgumentError,
            sa.exc.NoSuchModuleError,
            ModuleNotFoundError,
        ) as error:
            raise SettingsError(
                f"MEGATRON_RAY_DATABASE_URL cannot be used: {error}; use sqlite:///<path>, or "
                "postgresql+psycopg://... with `pip install 'megatron-ray[postgres]'`"
            ) from error
        store = cls(engine, notify)
        store._migrate()
        return store

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """Yields a session with a consistent view of the database, for reading only."""
        with Session(self._engine) as session:
            yield session

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """Yields a session in one transaction: all of the block or, on any exception, none."""
        with (
            self._lock,
            # Rows stay readable after the commit, when there is no transaction any more.
            Session(self._write_engine, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session
        # After the commit, because a waiter that is woken earlier would read the old state.
        self._notify(*sorted(session.info.get(WAKE, ())))

    def insert_or_ignore(
        self, session: Session, table: sa.Table, rows: list[dict[str, Any]]
    ) -> int:
        """Inserts the rows whose key is not there yet; returns how many were inserted."""
        if not rows:
            return 0
        # Both dialects spell it alike and share no class. Imported here because the
        # Postgres one loads all of its drivers' dialects.
        if self._engine.dialect.name == "sqlite":
            from sqlalchemy.dialects.sqlite import insert as sqlite_insert

            statement: sa.Insert = sqlite_insert(table).on_conflict_do_nothing()
        else:
            from sqlalchemy.dialects.postgresql import insert as postgresql_insert

            statement = postgresql_insert(table).on_conflict_do_nothing()
        return session.connection().execute(statement, rows).rowcount

    def deployment(self) -> DeploymentRow:
        """Returns the service's permanent identity, which the first call creates."""
        with self.write() as session:
            row = session.scalars(sa.select(DeploymentRow)).first()
            if row is None:
                name = secrets.token_hex(4)
                row = DeploymentRow(id=name, namespace=f"megatron-ray-{name}")
                row.created_at = time.time()
                session.add(row)
            return row

    def ping(self) -> None:
        """Raises sqlalchemy.exc.SQLAlchemyError when the database does not answer."""
        with self.read() as session:
            session.execute(sa.text("SELECT 1"))

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    def _migrate(self) -> None:
        # A writing transaction: of two services that start at once, one migrates.
        with self._lock, self._write_engine.begin() as connection:
            if _revision(connection) != REVISION:
                # Imported here because Alembic takes a fifth of a start, and nearly
                # every start finds nothing to do.
                from service.store.migrations.upgrade import upgrade

                upgrade(connection)


def _revision(connection: Connection) -> str | None:
    """Returns the newest migration of the database; None for a new database."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    statement = sa.text("SELECT version_num FROM alembic_version")
    revision: str | None = connection.scalar(statement)
    return revision


def _engine(url: sa.URL) -> Engine:
    backend = url.get_backend_name()
    if backend == "sqlite":
        return _sqlite_engine(url)
    if backend == "postgresql":
        return _postgresql_engine(url)
    raise sa.exc.ArgumentError(f"{backend} is not supported")


# ---- SQLite


def _sqlite_engine(url: sa.URL) -> Engine:
    if url.database in (None, "", ":memory:"):
        raise SettingsError(
            "MEGATRON_RAY_DATABASE_URL: SQLite needs a file, sqlite:///<path>; a database in "
            "memory does not survive a restart"
        )
    path = Path(str(url.database))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Made here, so that it is private whatever the umask; SQLite's other files get its mode.
    path.touch(mode=0o600)
    with contextlib.suppress(PermissionError):
        path.chmod(0o600)
    # 40 requests run at once in threads, and streams and long polls beside them.
    engine = sa.create_engine(
        url,
        pool_size=20,
        max_overflow=30,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
    )
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver must not open transactions by itself: `_begin_sqlite` does.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in _SQLITE_PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    statement = "BEGIN"
    if connection.get_execution_options().get(_WRITES):
        # A writer takes its lock first: a reader that turns into a writer half-way would
        # fail with "database is locked".
        statement = "BEGIN IMMEDIATE"
    connection.exec_driver_sql(statement)


# ---- Postgres


def _postgresql_engine(url: sa.URL) -> Engine:
    # pre_ping: a Postgres that was restarted has closed the pool's connections.
    engine = sa.create_engine(url, pool_size=20, max_overflow=30, pool_pre_ping=True)
    sa.event.listen(engine, "begin", _begin_postgresql)
    sa.event.listen(engine, "before_cursor_execute", _remove_nul, retval=True)
    return engine


def _begin_postgresql(connection: Connection) -> None:
    # Released by the end of the transaction, also when the service is killed.
    if connection.get_execution_options().get(_WRITES):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITE_LOCK})")


def _remove_nul(
    _connection: Any,
    _cursor: Any,
    statement: str,
    parameters: Any,
    _context: Any,
    _many: bool,
) -> tuple[str, Any]:
    """Replaces NUL characters in all parameters: text of Postgres cannot hold them.

    A job id with one then finds nothing, and in a rank's output it is shown as a mark.
    """
    return statement, _without_nul(parameters)


def _without_nul(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, dict):
        return {name: _without_nul(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_without_nul(part) for part in value])
    return value
