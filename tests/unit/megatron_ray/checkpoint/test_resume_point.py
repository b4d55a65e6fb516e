"""The checkpoint that a run resumes from, and what is reported about the others."""

from pathlib import Path

import pytest

from megatron_ray.checkpoint.directory import RunIdentity, checkpoint_path, commit
from megatron_ray.checkpoint.resume_point import (
    MixedRunsError,
    NoWholeCheckpointError,
    choose_resume_point,
)
from megatron_ray.storage.storage import open_storage


def write(
    root: Path, step: int, *, committed: bool = True, run: str | None = "run-1"
) -> Path:
    path = checkpoint_path(str(root), step, 1)
    storage = open_storage(path)
    storage.write_bytes_atomic("index.json", b'{"files": {"data/rank-00000.bin": 8}}')
    storage.write_bytes_atomic("data/rank-00000.bin", b"12345678")
    if committed:
        commit(path, RunIdentity(run).to_manifest(), [])
    return Path(path)


def test_an_empty_folder_has_nothing_to_resume_from(tmp_path: Path) -> None:
    assert choose_resume_point(str(tmp_path)).checkpoint is None
    write(tmp_path, 10, committed=False)
    point = choose_resume_point(str(tmp_path))
    assert point.checkpoint is None
    assert [item.cause for item in point.passed_over] == ["its save did not finish"]


def test_every_newer_checkpoint_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in (10, 20, 30, 40)]
    paths.append(write(tmp_path, 50, committed=False))
    paths.append(write(tmp_path, 60))
    (paths[5] / "COMMITTED").unlink()
    (paths[0] / "data" / "rank-00000.bin").unlink()
    (paths[2] / "data" / "rank-00000.bin").unlink()
    (paths[3] / "manifest.json").write_text("{")
    point = choose_resume_point(str(tmp_path))
    assert point.checkpoint is not None
    assert point.checkpoint.step == 20
    assert [str(item) for item in point.passed_over] == [
        f"{paths[5]}: its COMMITTED marker is missing",
        f"{paths[4]}: its save did not finish",
        f"{paths[3]}: manifest.json is missing or not readable",
        f"{paths[2]}: its file data/rank-00000.bin is missing",
    ]


def test_damage_that_only_reading_shows_counts_too(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    asked = []

    def find_damage(info: object) -> str | None:
        asked.append(info)
        return "other bytes" if len(asked) < 3 else None

    point = choose_resume_point(str(tmp_path), find_damage)
    assert point.checkpoint is not None
    assert point.checkpoint.step == 10
    assert [item.cause for item in point.passed_over] == ["other bytes", "other bytes"]


def test_where_no_committed_checkpoint_is_whole_nothing_begins_anew(tmp_path: Path) -> None:
    for step in (10, 20):
        (write(tmp_path, step) / "index.json").unlink()
    write(tmp_path, 30, committed=False)
    with pytest.raises(NoWholeCheckpointError) as caught:
        choose_resume_point(str(tmp_path))
    message = str(caught.value)
    assert message.startswith(
        f"cannot resume from {tmp_path}: none of its committed checkpoints is whole:\n"
    )
    assert "step-00000020-a0001: its file index.json is missing" in message
    assert "step-00000010-a0001" in message
    assert "step-00000030" not in message
    assert "move these folders away or use another storage.path" in message


def test_checkpoints_of_two_runs_are_never_confused(tmp_path: Path) -> None:
    write(tmp_path, 5, run=None)
    write(tmp_path, 10, run="run-1")
    assert choose_resume_point(str(tmp_path)).checkpoint is not None
    write(tmp_path, 20, run="run-2")
    with pytest.raises(
        MixedRunsError,
        match=r"run run-1: step-00000010-a0001\n  run run-2: step-00000020-a0001\nmove those",
    ):
        choose_resume_point(str(tmp_path))
