"""Checkpoint folders: what counts, what is kept, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ray.checkpoint.directory import (
    CheckpointError,
    DamagedCheckpointError,
    RunIdentity,
    checkpoint_path,
    commit,
    latest_committed,
    list_checkpoints,
    read_manifest,
)
from megatron_ray.checkpoint.index import data_file
from megatron_ray.checkpoint.initial_model import is_native_checkpoint
from megatron_ray.checkpoint.train_state import TOKENIZER, TRAIN_STATE, rank_state_file
from megatron_ray.storage.storage import open_storage
from tests.support.checkpoint_folders import write_checkpoint


def write(
    root: Path,
    step: int,
    attempt: int = 1,
    *,
    committed: bool = True,
    loss: float | None = None,
) -> str:
    manifest = None
    if committed:
        manifest = {"step": step, "attempt": attempt, "loss": loss}
    reports = [{"kind": "step", "step": step}]
    return write_checkpoint(root, step, attempt, manifest, reports)


def steps(root: Path) -> list[tuple[int, int]]:
    return [info.order for info in list_checkpoints(str(root))]


def test_paths_carry_step_and_attempt() -> None:
    assert (
        checkpoint_path("s3://bucket/job/", 50, 1)
        == "s3://bucket/job/checkpoints/step-00000050-a0001"
    )


def test_a_committed_checkpoint_has_reports_manifest_and_loss(tmp_path: Path) -> None:
    path = write(tmp_path, 50, loss=2.5)
    (info,) = list_checkpoints(str(tmp_path))
    assert (info.step, info.attempt, info.path, info.committed, info.loss) == (
        50,
        1,
        path,
        True,
        2.5,
    )
    assert info.bytes > 10
    manifest = read_manifest(path)
    assert manifest["files"] == {
        "index.json": 37,
        "data/rank-00000.bin": 8,
        "reports.jsonl": 29,
    }
    assert json.loads(Path(path, "reports.jsonl").read_text()) == {
        "kind": "step",
        "step": 50,
    }


def test_no_checkpoints_is_an_empty_list(tmp_path: Path) -> None:
    assert list_checkpoints(str(tmp_path / "none")) == []
    assert latest_committed(str(tmp_path)) is None


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert steps(tmp_path) == [(1, 1)]


def test_the_latest_is_by_step_and_attempt_and_skips_torn_ones(tmp_path: Path) -> None:
    write(tmp_path, 9)
    write(tmp_path, 100, 1)
    write(tmp_path, 100, 2)
    write(tmp_path, 200, committed=False)
    damaged = write(tmp_path, 150)
    Path(damaged, "data/rank-00000.bin").write_bytes(b"123")
    latest = latest_committed(str(tmp_path))
    assert latest is not None
    assert latest.order == (100, 2)


def test_a_marker_without_manifest_does_not_count(tmp_path: Path) -> None:
    path = write(tmp_path, 9)
    Path(path, "manifest.json").write_text("[1]")
    assert latest_committed(str(tmp_path)) is None
    with pytest.raises(
        CheckpointError,
        match=r"cannot load .*a0001: manifest.json is missing or not readable",
    ):
        read_manifest(path)


def test_committing_twice_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, 9)
    commit(path, {"step": 10}, [])
    assert read_manifest(path)["step"] == 9


def test_commit_needs_the_common_part(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"cannot commit .*: index.json is missing, rank 0 has not written its part",
    ):
        commit(str(tmp_path / "empty"), {}, [])


def test_commit_needs_every_rank(tmp_path: Path) -> None:
    path = write(tmp_path, 5, committed=False)
    Path(path, "data/rank-00000.bin").unlink()
    with pytest.raises(
        CheckpointError, match=r"cannot commit .*: its file data/rank-00000.bin is missing"
    ):
        commit(path, {}, [])
    assert not Path(path, "COMMITTED").exists()


def test_torn_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"cannot load .*/nowhere: there is no checkpoint at this path",
    ):
        read_manifest(str(tmp_path / "nowhere"))
    with pytest.raises(
        CheckpointError,
        match=r"cannot load .*a0001: it is not committed \(no COMMITTED marker\)",
    ):
        read_manifest(write(tmp_path, 5, committed=False))
    path = write(tmp_path, 6)
    Path(path, "data/rank-00000.bin").write_bytes(b"1234")
    with pytest.raises(
        CheckpointError, match=r"its file data/rank-00000.bin has 4 bytes, 8 were written"
    ):
        read_manifest(path)
    Path(path, "data/rank-00000.bin").unlink()
    with pytest.raises(CheckpointError, match=r"its file data/rank-00000.bin is missing"):
        read_manifest(path)


def test_where_a_runs_folder_is_given_its_newest_checkpoint_is_named(
    tmp_path: Path,
) -> None:
    write(tmp_path, 10)
    newest = write(tmp_path, 20)
    for folder in (tmp_path, tmp_path / "checkpoints", f"{tmp_path}/"):
        for read in (read_manifest, is_native_checkpoint):
            with pytest.raises(
                CheckpointError, match=f"newest checkpoint is {newest}: giv"
            ):
                read(str(folder))


@pytest.mark.parametrize("version", [2, None, "1"])
def test_newer_formats_are_refused(tmp_path: Path, version: object) -> None:
    path = write(tmp_path, 5)
    manifest = json.loads(Path(path, "manifest.json").read_text())
    Path(path, "manifest.json").write_text(
        json.dumps({**manifest, "format_version": version})
    )
    with pytest.raises(
        CheckpointError,
        match=rf"format_version is {version}, this program reads up to 1; use the newer program",
    ):
        read_manifest(path)


def test_files_for_people_may_be_edited_removed_and_added(tmp_path: Path) -> None:
    path = Path(write(tmp_path, 5, committed=False))
    (path / "spec.yaml").write_text("steps: 1000\n")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    commit(str(path), {}, [])
    (path / "spec.yaml").write_text("steps: 2\n")
    (path / "spec.yaml~").write_text("steps: 1000\n")
    (path / ".spec.yaml.swp").write_bytes(b"b0VIM")
    (path / "spec-of-my-own.yaml").write_text("steps: 7\n")
    (path / "chat_template.jinja").unlink()
    (path / "reports.jsonl").unlink()
    assert "spec.yaml" in read_manifest(str(path))["files"]
    (info,) = list_checkpoints(str(tmp_path))
    assert info.committed
    assert info.damage is None


@pytest.mark.parametrize("name", [TRAIN_STATE, TOKENIZER, rank_state_file(3), data_file(2)])
def test_a_file_that_loading_needs_may_not_change_its_size(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path, 5, committed=False)
    open_storage(path).write_bytes_atomic(name, b"{}")
    commit(path, {}, [])
    Path(path, name).write_bytes(b"{ }")
    message = f"its file {name} has 3 bytes, 2 were written"
    with pytest.raises(DamagedCheckpointError, match=message):
        read_manifest(path)
    (info,) = list_checkpoints(str(tmp_path))
    assert (info.committed, info.was_committed, info.damage) == (False, True, message)


def test_a_manifest_names_the_run_that_wrote_it(tmp_path: Path) -> None:
    runs = [
        RunIdentity("run-x", 3),
        RunIdentity(),
        RunIdentity("job-a", 1, owns_unnamed=True),
        RunIdentity(damaged=("step-00000001-a0001",)),
    ]
    for step, run in enumerate(runs):
        commit(write(tmp_path, step, committed=False), run.to_manifest(), [])
    assert [info.run for info in list_checkpoints(str(tmp_path))] == runs


def test_drivers_need_no_torch_to_commit() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import megatron_ray.checkpoint.directory, "
        "megatron_ray.sharding.flat_boxes"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
