"""Checkpoints that are deleted, and those that never are."""

import errno
import os
from pathlib import Path

import pytest

from megatron_ray.checkpoint.directory import (
    RunIdentity,
    checkpoint_path,
    latest_committed,
    list_checkpoints,
)
from megatron_ray.checkpoint.retention import apply_retention, delete_checkpoint
from megatron_ray.storage.errors import StorageError
from tests.support.checkpoint_folders import write_checkpoint


def write(
    root: Path,
    step: int,
    attempt: int = 1,
    *,
    committed: bool = True,
    run: RunIdentity | None = None,
) -> str:
    manifest = None
    if committed:
        manifest = (run or RunIdentity()).to_manifest()
    return write_checkpoint(root, step, attempt, manifest)


def steps(root: Path) -> list[tuple[int, int]]:
    return [info.order for info in list_checkpoints(str(root))]


def test_without_checkpoints_nothing_is_deleted(tmp_path: Path) -> None:
    assert apply_retention(str(tmp_path), 1) == []


def test_a_damaged_checkpoint_is_neither_counted_nor_deleted(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    Path(checkpoint_path(str(tmp_path), 10, 1), "index.json").unlink()
    Path(checkpoint_path(str(tmp_path), 40, 1), "manifest.json").unlink()
    assert [path[-5:] for path in apply_retention(str(tmp_path), 1)] == ["a0001"]
    assert steps(tmp_path) == [(10, 1), (30, 1), (40, 1)]


def test_a_checkpoint_with_damaged_bytes_is_kept_though_its_files_have_their_sizes(
    tmp_path: Path,
) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    apply_retention(str(tmp_path), 1, RunIdentity(damaged=("step-00000010-a0001",)))
    assert steps(tmp_path) == [(10, 1), (30, 1)]


def test_a_run_deletes_its_own_checkpoints_only(tmp_path: Path) -> None:
    first = RunIdentity("first")
    second = RunIdentity("second", first_attempt=2)
    for step in (10, 20, 30):
        write(tmp_path, step, 1, run=first)
        write(tmp_path, step, 2, run=second)
    write(tmp_path, 5)
    write(tmp_path, 15, 1, committed=False)
    write(tmp_path, 15, 2, committed=False)
    apply_retention(str(tmp_path), 1, second)
    assert steps(tmp_path) == [(5, 1), (10, 1), (15, 1), (20, 1), (30, 1), (30, 2)]
    # A job of a service always had its folder to itself, also before runs had ids.
    apply_retention(str(tmp_path), 1, RunIdentity("first", owns_unnamed=True))
    assert steps(tmp_path) == [(30, 1), (30, 2)]


def test_retention_keeps_the_newest_and_what_may_be_in_the_making(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    write(tmp_path, 25, committed=False)
    write(tmp_path, 50, committed=False)
    write(tmp_path, 30, 2, committed=False)  # a later attempt that went back
    deleted = apply_retention(str(tmp_path), 2)
    assert sorted(path.rpartition("/")[2] for path in deleted) == [
        "step-00000010-a0001",
        "step-00000020-a0001",
        "step-00000025-a0001",
    ]
    assert steps(tmp_path) == [(30, 1), (30, 2), (40, 1), (50, 1)]
    assert apply_retention(str(tmp_path), 2) == []


def test_the_only_committed_checkpoint_stays(tmp_path: Path) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20, committed=False)
    assert apply_retention(str(tmp_path), 1) == []
    with pytest.raises(
        ValueError,
        match="keep_last=0 must be at least 1: the only committed checkpoint is never deleted",
    ):
        apply_retention(str(tmp_path), 0)


def test_deleting_takes_the_marker_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, 10)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "disk gone")

    monkeypatch.setattr("shutil.rmtree", fail)
    with pytest.raises(StorageError, match=os.strerror(errno.EIO)):
        delete_checkpoint(str(tmp_path), list_checkpoints(str(tmp_path))[0])
    assert Path(path, "index.json").exists()
    assert latest_committed(str(tmp_path)) is None
