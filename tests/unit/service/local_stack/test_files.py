"""A stack's files are private, and its logs do not fill the disk."""

import os
from pathlib import Path

import pytest

from service.local_stack import files as files_module
from service.local_stack.files import StackFiles, private_folder
from service.local_stack.sessions import GatedProcess
from service.store.database import Store


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture(autouse=True)
def _open_umask() -> None:
    os.umask(0o022)


def test_a_folder_is_private_also_when_an_earlier_version_made_it(tmp_path: Path) -> None:
    assert mode(private_folder(tmp_path / "new" / "logs")) == 0o700
    (tmp_path / "old").mkdir(mode=0o755)
    with StackFiles(tmp_path / "old").lock():
        assert mode(tmp_path / "old") == 0o700


def test_the_database_is_private_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "data" / "service.db"
    store = Store.open(f"sqlite:///{path}")
    store.deployment()
    assert mode(path.parent) == 0o700
    written = sorted(path.parent.iterdir())
    assert path in written
    assert {mode(file) for file in written} == {0o600}
    store.close()


def test_logs_are_private(tmp_path: Path) -> None:
    gated = GatedProcess(["true"], log=tmp_path / "service.log")
    gated.abandon()
    assert mode(tmp_path / "service.log") == 0o600


def test_a_large_log_is_rotated_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "MAX_LOG_BYTES", 100)
    files = StackFiles(tmp_path)
    files.rotate_logs()
    log = files.log("service")
    with log.open("ab", buffering=0) as writer:
        writer.write(b"a" * 100)
        files.limit_logs()
        assert log.read_bytes() == b"a" * 100
        writer.write(b"b")
        files.limit_logs()
        writer.write(b"c")
    assert log.read_bytes() == b"c"
    assert log.with_suffix(".previous.log").read_bytes() == b"a" * 100 + b"b"
