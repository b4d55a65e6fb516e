"""Settings, start-up, database file, and the service as a process."""

import importlib.resources
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from service.http.auth import (
    adopt_tokens,
    fingerprint,
    has_configured_token,
    service_key,
)
from service.http.tokens import (
    Scope,
    new_token,
    read_or_create_tokens,
    read_tokens,
    write_tokens,
)
from service.main import bind, is_loopback, refuse_open_bind
from service.settings import Settings, SettingsError
from service.store.database import Store, wake
from service.store.migrations.upgrade import configuration
from service.store.schema import REVISION, EvaluationRow, MetricRow, Table, TokenRow


def create_token(store: Store, scope: Scope, name: str) -> str:
    """A token that is not from a tokens file."""
    token = new_token()
    with store.write() as session:
        row = TokenRow(sha256=fingerprint(token), scope=scope, name=name)
        row.created_at = time.time()
        session.add(row)
    return token


def test_settings_come_from_the_environment(tmp_path: Path) -> None:
    settings = Settings.from_environment(
        {
            "MEGATRON_RAY_DATA_DIR": str(tmp_path),
            "MEGATRON_RAY_PORT": "0",
            "MEGATRON_RAY_CLUSTERS": "a, b",
            "MEGATRON_RAY_HOST": "",
            "HOME": "/x",
        }
    )
    assert (settings.data_dir, settings.port, settings.clusters, settings.host) == (
        tmp_path,
        0,
        ("a", "b"),
        "127.0.0.1",
    )
    assert settings.url == f"sqlite:///{tmp_path}/service.db"


def test_the_data_dir_is_in_the_home_folder_when_none_is_given() -> None:
    assert Settings.from_environment({}).data_dir == Path.home() / ".megatron-ray"


def test_wrong_settings_name_their_variable() -> None:
    with pytest.raises(
        SettingsError,
        match="MEGATRON_RAY_PORT: must be at most 65535, got '70000'",
    ):
        Settings.from_environment({"MEGATRON_RAY_PORT": "70000"})
    assert Settings.from_environment({"MEGATRON_RAY_PORT": "8e3"}).port == 8000
    with pytest.raises(SettingsError, match="got '8k'; write it as 1000 or 1e3"):
        Settings.from_environment({"MEGATRON_RAY_PORT": "8k"})
    with pytest.raises(SettingsError, match="MEGATRON_RAY_CLUSTERS"):
        Settings.from_environment({"MEGATRON_RAY_CLUSTERS": " , "})


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_open_addresses_need_a_configured_token(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, host="0.0.0.0")
    with pytest.raises(
        SettingsError,
        match=r"refusing to listen on 0.0.0.0: no token is configured; "
        "set MEGATRON_RAY_TOKENS_FILE",
    ):
        refuse_open_bind(settings)
    refuse_open_bind(settings.model_copy(update={"host": "127.0.0.1"}))
    write_tokens(tmp_path / "tokens.json")
    refuse_open_bind(settings.model_copy(update={"tokens_file": tmp_path / "tokens.json"}))
    store = Store.open(settings.url)
    create_token(store, Scope.AGENT, "agent")
    assert not has_configured_token(settings), "an agent's token lets no user in"
    token = create_token(store, Scope.USER, "me")
    with store.read() as session:
        assert {
            row.sha256
            for row in session.scalars(sa.select(TokenRow))
            if row.scope == "user"
        } == {fingerprint(token)}
    store.close()
    refuse_open_bind(settings)


def test_unknown_hosts_and_taken_ports_are_said_plainly() -> None:
    with pytest.raises(SettingsError, match="use an address of this machine"):
        is_loopback("no such host")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            SettingsError,
            match=f"cannot listen on 127.0.0.1:{port}: .*; choose another MEGATRON_RAY_PORT, or 0",
        ):
            bind("127.0.0.1", port)


def test_small_answers_are_not_held_back() -> None:
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP, (
            "asyncio sets TCP_NODELAY on such sockets only"
        )


def test_tokens_file(tmp_path: Path) -> None:
    path = tmp_path / "t" / "tokens.json"
    tokens = write_tokens(path)
    assert read_tokens(path) == tokens
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(set(tokens.values())) == 2
    with pytest.raises(FileExistsError):
        write_tokens(path)
    assert read_tokens(path) == tokens
    assert list(path.parent.iterdir()) == [path], "no rest of the second try"
    # An editor may add a byte order mark.
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_tokens(path) == tokens
    secret = "s" * 20
    for content in (
        "",
        "[]",
        "{}",
        '{"root": "x"}',
        json.dumps({"user": secret}),
        '{"user": 7}',
        json.dumps({"user": "a.b" * 20}),
    ):
        path.write_text(content)
        with pytest.raises(SettingsError, match="MEGATRON_RAY_TOKENS_FILE") as caught:
            read_tokens(path)
        assert secret not in str(caught.value)
    with pytest.raises(SettingsError, match="No such file"):
        read_tokens(tmp_path / "missing")


def test_a_stack_makes_its_tokens_once_and_needs_both(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    tokens = read_or_create_tokens(path)
    assert read_or_create_tokens(path) == tokens
    assert set(tokens) == {
        Scope.USER,
        Scope.AGENT,
    }
    path.write_text(json.dumps({"user": "u" * 40}))
    with pytest.raises(SettingsError, match="both tokens; delete it"):
        read_or_create_tokens(path)


def test_a_changed_tokens_file_revokes_the_old_tokens_and_keeps_others(
    tmp_path: Path,
) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/s.db")
    kept = create_token(store, Scope.USER, "made by hand")
    adopt_tokens(store, {Scope.USER: "1" * 40, Scope.AGENT: "2" * 40})
    adopt_tokens(store, {Scope.USER: "3" * 40})
    with store.read() as session:
        assert set(session.scalars(sa.select(TokenRow.sha256))) == {
            fingerprint(kept),
            fingerprint("3" * 40),
        }
    store.close()


def test_a_damaged_key_is_refused(tmp_path: Path) -> None:
    key = service_key(tmp_path)
    assert service_key(tmp_path) == key
    assert len(key) == 32
    (tmp_path / "service.key").write_bytes(b"short")
    with pytest.raises(SettingsError, match="5 bytes instead of 32; delete it"):
        service_key(tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "nonsense",
        "nosuch://x/y",
        "mysql://x/y",
        "postgresql+nodriver://x/y",
    ],
)
def test_unusable_databases_are_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="MEGATRON_RAY_DATABASE_URL"):
        Store.open(url)


def test_migrations_make_exactly_the_tables_of_the_code(
    tmp_path: Path, new_database: Callable[[], str | None]
) -> None:
    url = new_database() or f"sqlite:///{tmp_path}/with space/100%/s.db"
    Store.open(url).close()
    store = Store.open(url)
    store.close()
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        assert (
            compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
        )
        if connection.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    engine.dispose()


def test_a_database_of_the_first_schema_keeps_its_steps(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/s.db")
    with engine.begin() as connection:
        command.upgrade(configuration(connection), "0001")
        connection.exec_driver_sql(
            "INSERT INTO metrics (job, step, attempt, cursor, loss) VALUES (1, 2, 1, 1, 0.5)"
        )
    store = Store.open(f"sqlite:///{tmp_path}/s.db")
    with store.read() as session:
        (row,) = session.scalars(sa.select(MetricRow))
        assert (row.step, row.loss, row.other_losses) == (2, 0.5, None)
    store.close()
    with engine.begin() as connection:
        command.downgrade(configuration(connection), "0001")
        assert connection.exec_driver_sql("SELECT step, loss FROM metrics").all() == [
            (2, 0.5)
        ]
    engine.dispose()


def test_evaluations_of_an_earlier_database_become_rows(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/s.db")
    data = '{"step": 4, "split": "validation", "loss": 2.5, "num_tokens": 8}'
    with engine.begin() as connection:
        command.upgrade(configuration(connection), "0002")
        connection.exec_driver_sql(
            "INSERT INTO events VALUES (1, 3, 'a1/r0', 7, 1, 0.0, 'info', 'eval.completed', "
            f"'', '{data}', '[]', 'system')"
        )
        command.upgrade(configuration(connection), "head")
        (row,) = connection.execute(sa.select(EvaluationRow.__table__)).all()
    assert (row.job, row.attempt, row.step, row.loss) == (1, 1, 4, 2.5)
    assert (row.num_tokens, row.source_losses) == (8, {})
    engine.dispose()


def test_the_newest_migration_is_the_one_the_code_names(tmp_path: Path) -> None:
    folder = str(importlib.resources.files("service.store") / "migrations")
    assert ScriptDirectory(folder).get_current_head() == REVISION


def test_a_current_database_is_opened_without_alembic(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    Store.open(url).close()
    code = (
        f"import sys; from service.store.database import Store; Store.open({url!r}).close(); "
        "print('alembic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_starting_imports_nothing_that_only_some_requests_need() -> None:
    code = (
        "import sys; import service.main; print([name for name in ('alembic', 'pyarrow', "
        "'numpy', 'typer', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_failed_transaction_leaves_nothing_and_wakes_nobody(tmp_path: Path) -> None:
    woken: list[str] = []
    store = Store.open(f"sqlite:///{tmp_path}/s.db", lambda *topics: woken.extend(topics))

    def fail_half_way() -> None:
        with store.write() as session:
            session.add(TokenRow(sha256="x", scope="user", name="n", created_at=0))
            session.flush()
            wake(session, "topic")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    with store.read() as session:
        assert session.scalars(sa.select(TokenRow)).all() == []
        assert woken == []
    store.close()


def start_process(tmp_path: Path, **more: str) -> subprocess.Popen[str]:
    write_tokens(tmp_path / "tokens.json")
    variables = {
        "MEGATRON_RAY_DATA_DIR": str(tmp_path / "data"),
        "MEGATRON_RAY_PORT": "0",
        "MEGATRON_RAY_PORT_FILE": str(tmp_path / "port"),
        "MEGATRON_RAY_TOKENS_FILE": str(tmp_path / "tokens.json"),
    }
    environment = {**os.environ, **variables, **more}
    return subprocess.Popen(
        [sys.executable, "-m", "service.main"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_process_writes_its_port_and_ends_promptly_with_open_streams(
    tmp_path: Path, spec: dict[str, Any], number: signal.Signals
) -> None:
    process = start_process(tmp_path)
    port_file = tmp_path / "port"
    while not port_file.exists():
        assert process.poll() is None
        time.sleep(0.02)
    url = f"http://127.0.0.1:{port_file.read_text().strip()}"
    token = read_tokens(tmp_path / "tokens.json")[Scope.USER]
    with httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {token}"}, trust_env=False
    ) as client:
        job_id = client.post("/v1/jobs", json=spec).json()["id"]
        with client.stream("GET", f"/v1/jobs/{job_id}/stream") as response:
            lines = response.iter_lines()
            next(lines)
            began = time.monotonic()
            process.send_signal(number)
            _, log = process.communicate(timeout=20)
    assert time.monotonic() - began < 3
    assert "Traceback" not in log
    assert "ERROR" not in log
    assert token not in log
    assert "/stream" not in log
    assert process.returncode in (0, -number)


def test_a_wrong_setting_ends_the_process_with_one_line(tmp_path: Path) -> None:
    process = start_process(tmp_path, MEGATRON_RAY_PORT="x")
    _, log = process.communicate(timeout=30)
    assert process.returncode == 1
    assert log.startswith("megatron-ray service: MEGATRON_RAY_PORT: ")
    assert log.count("\n") == 1


def test_service_imports_with_torch_and_ray_blocked() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['ray'] = None; import service.main, "
        "service.app; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


def test_a_killed_service_loses_nothing_it_has_answered(
    tmp_path: Path, spec: dict[str, Any]
) -> None:
    made: list[str] = []
    for attempt in range(2):
        (tmp_path / "tokens.json").unlink(missing_ok=True)
        (tmp_path / "port").unlink(missing_ok=True)
        process = start_process(tmp_path)
        while not (tmp_path / "port").exists():
            assert process.poll() is None
            time.sleep(0.02)
        token = read_tokens(tmp_path / "tokens.json")[Scope.USER]
        url = f"http://127.0.0.1:{(tmp_path / 'port').read_text().strip()}"
        with httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, trust_env=False
        ) as client:
            listed = [job["id"] for job in client.get("/v1/jobs").json()["data"]]
            assert sorted(listed) == sorted(made), f"start {attempt}"
            made += [client.post("/v1/jobs", json=spec).json()["id"] for _ in range(5)]
            process.kill()
            process.communicate(timeout=10)
