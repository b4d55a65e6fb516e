"""What a rollback leaves behind is used by no later start, and not deleted either."""

from pathlib import Path

import pytest

from megatron_ray.checkpoint.directory import (
    CheckpointError,
    RunIdentity,
    attempt_of,
    checkpoint_path,
    forget_rollbacks,
    latest_committed,
    list_checkpoints,
    record_rollback,
    rollbacks_of,
)
from megatron_ray.checkpoint.records.rollbacks import Rollback, steps_left_out
from megatron_ray.checkpoint.resume_point import choose_resume_point
from megatron_ray.checkpoint.retention import apply_retention
from tests.support.checkpoint_folders import write_checkpoint

FIRST = Rollback(attempt=1, step=21, leave_out=2, max_step=15, message="a spike")
SECOND = Rollback(attempt=2, step=40, leave_out=1, max_step=39)


def write(root: Path, *orders: tuple[int, int]) -> None:
    for step, attempt in orders:
        write_checkpoint(root, step, attempt, RunIdentity().to_manifest())


def newest(root: Path) -> tuple[int, int] | None:
    info = choose_resume_point(str(root)).checkpoint
    assert info == latest_committed(str(root))
    if info is None:
        return None
    return info.order


def test_later_states_of_earlier_attempts_are_left_behind(tmp_path: Path) -> None:
    write(tmp_path, (10, 1), (15, 1), (20, 1))
    assert newest(tmp_path) == (20, 1)
    record_rollback(str(tmp_path), FIRST)
    assert newest(tmp_path) == (15, 1)
    write(tmp_path, (20, 2))
    assert newest(tmp_path) == (20, 2)
    record_rollback(str(tmp_path), FIRST)
    assert rollbacks_of(str(tmp_path)) == (FIRST,), "once"
    record_rollback(str(tmp_path), SECOND)
    assert rollbacks_of(str(tmp_path)) == (FIRST, SECOND)
    assert steps_left_out(rollbacks_of(str(tmp_path))) == (20, 21, 40)
    assert newest(tmp_path) == (20, 2)


def test_what_is_left_behind_is_neither_counted_nor_deleted(tmp_path: Path) -> None:
    write(tmp_path, (10, 1), (15, 1), (20, 1))
    record_rollback(str(tmp_path), FIRST)
    write(tmp_path, (18, 2))
    apply_retention(str(tmp_path), 1)
    kept = [info.order for info in list_checkpoints(str(tmp_path))]
    assert kept == [(18, 2), (20, 1)]


def test_a_new_run_forgets_them(tmp_path: Path) -> None:
    forget_rollbacks(str(tmp_path))
    record_rollback(str(tmp_path), FIRST)
    forget_rollbacks(str(tmp_path))
    assert rollbacks_of(str(tmp_path)) == ()


def test_a_record_that_cannot_be_read_is_an_error_with_its_name(tmp_path: Path) -> None:
    write(tmp_path, (10, 1))
    (tmp_path / "checkpoints" / "rollbacks.json").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"checkpoints/rollbacks\.json is not readable"
    ):
        list_checkpoints(str(tmp_path))


def test_a_folder_names_its_attempt() -> None:
    assert attempt_of(checkpoint_path("/runs/job", 20, 12)) == 12
    with pytest.raises(ValueError, match="no checkpoint"):
        attempt_of("/runs/job")
