"""Saving and loading on one rank: refusals, dtypes, bounded reads, object storage, the
interplay of saves.
"""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs

from megatron_ray.checkpoint import load as load_module
from megatron_ray.checkpoint.directory import CheckpointError, commit
from megatron_ray.checkpoint.load import load_into
from megatron_ray.checkpoint.train_state import read_train_state
from megatron_ray.checkpoint.writer import CheckpointWriter
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.reports import CheckpointReport
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.sharded_state import ShardedState, ShardedTensor, TensorBox
from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.storage import LocalStorage, ObjectStorage


def one(
    tensor: torch.Tensor, box: Box | None = None, shape: tuple[int, ...] | None = None
) -> ShardedTensor:
    size = tuple(tensor.shape)
    return ShardedTensor(
        shape or size, [TensorBox(box or Box((0,) * len(size), size), tensor)]
    )


def saved(
    path: Path, state: ShardedState, train_state: dict[str, Any] | None = None
) -> str:
    writer = CheckpointWriter(ParallelMesh.single(), "sync", lambda _: None)
    writer.save(1, str(path), state, {"format_version": 1, **(train_state or {})})
    writer.close()
    commit(str(path), {"step": 1}, [])
    return str(path)


@pytest.mark.parametrize("scratch", [16, 64, 1 << 20])
def test_columns_come_through_a_small_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch: int
) -> None:
    monkeypatch.setattr(load_module, "SCRATCH_BYTES", scratch)
    full = torch.randn(7, 5, 3)
    path = saved(tmp_path / "c", {"model/x": one(full)})
    part = torch.zeros(4, 2, 3)
    load_into(path, {"model/x": one(part, Box((2, 1, 0), (4, 2, 3)), (7, 5, 3))})
    assert torch.equal(part, full[2:6, 1:3])


def test_dtypes_are_converted_on_loading(tmp_path: Path) -> None:
    full = torch.randn(6, 4)
    path = saved(tmp_path / "c", {"model/x": one(full)})
    half = torch.zeros(6, 4, dtype=torch.bfloat16)
    load_into(path, {"model/x": one(half)})
    assert torch.equal(half, full.bfloat16())


def test_strided_and_gradient_carrying_targets_are_filled(tmp_path: Path) -> None:
    full = torch.randn(6, 4)
    path = saved(tmp_path / "c", {"model/x": one(full), "model/y": one(full * 2)})
    wide = torch.zeros(6, 9)
    parameter = torch.nn.Parameter(torch.zeros(6, 4))
    load_into(path, {"model/x": one(wide[:, 2:6]), "model/y": one(parameter)})
    assert torch.equal(wide[:, 2:6], full)
    assert torch.equal(parameter, full * 2)
    assert wide[:, :2].eq(0).all()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "c", {"model/x": one(torch.zeros(6, 4))})
    with pytest.raises(
        CheckpointError,
        match=r"it has no tensor 'model/y': it was saved from another model, or with that frozen",
    ):
        load_into(path, {"model/y": one(torch.zeros(6, 4))})
    with pytest.raises(
        CheckpointError,
        match=r"its tensor 'model/x' has shape \(6, 4\), the model needs \(6, 5\)",
    ):
        load_into(path, {"model/x": one(torch.zeros(6, 5))})
    with pytest.raises(
        CheckpointError,
        match=r"its tensor 'model/x' lacks 4 elements of the boxes asked for",
    ):
        load_into(path, {"model/x": one(torch.zeros(2, 4), Box((5, 0), (2, 4)), (6, 4))})
    with pytest.raises(
        ValueError, match=r"a tensor of shape \(2, 4\) does not fill a box of size \(3, 4\)"
    ):
        TensorBox(Box((0, 0), (3, 4)), torch.zeros(2, 4))


def test_tensors_not_asked_for_are_left_out(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "c",
        {"model/x": one(torch.ones(3)), "optimizer/exp_avg/x": one(torch.zeros(3))},
    )
    target = torch.zeros(3)
    load_into(path, {"model/x": one(target)})
    assert target.tolist() == [1, 1, 1]


def test_partly_held_tensors_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"the boxes of all ranks do not cover every tensor: model/x has 8 of 24 elements",
    ):
        saved(
            tmp_path / "c", {"model/x": one(torch.zeros(2, 4), Box((0, 0), (2, 4)), (6, 4))}
        )


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            b'{"format_version": 1, "files": {}, "tensors": []}',
            "index.json is not readable",
        ),
        (b'{"format_version": 1, "files": {}}', "index.json is not readable: 'tensors'"),
        (
            b'{"format_version": 1, "files": {}, "tensors": '
            b'{"x": {"dtype": "Tensor", "shape": [], "chunks": []}}}',
            "x: unknown dtype 'Tensor'",
        ),
        (
            b'{"format_version": 2, "files": {}, "tensors": {}}',
            "format_version is 2, this program reads up to 1",
        ),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: bytes, message: str) -> None:
    LocalStorage(str(tmp_path)).write_bytes_atomic("c/index.json", index)
    commit(str(tmp_path / "c"), {}, [])
    with pytest.raises(CheckpointError, match=message):
        load_into(str(tmp_path / "c"), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "train_state.json is not readable"),
        ('{"format_version": 9}', "format_version is 9"),
    ],
)
def test_a_bad_train_state_is_refused(tmp_path: Path, text: str, message: str) -> None:
    LocalStorage(str(tmp_path)).write_bytes_atomic("c/index.json", b'{"files": {}}')
    Path(tmp_path, "c", "train_state.json").write_text(text)
    commit(str(tmp_path / "c"), {}, [])
    with pytest.raises(CheckpointError, match=message):
        read_train_state(str(tmp_path / "c"), 0)


def test_the_train_state_is_what_was_given_at_the_save(tmp_path: Path) -> None:
    train_state = {
        "step": 1,
        "consumed_samples": 8,
        "config": {"a": [1, 2]},
        "rng": {"cpu": "abc"},
    }
    path = saved(tmp_path / "c", {"model/x": one(torch.ones(3))}, train_state)
    assert read_train_state(path, 0) == {"format_version": 1, **train_state}
    assert "rng" not in json.loads(Path(path, "train_state.json").read_text())


def test_a_changed_layout_needs_a_new_writer(tmp_path: Path) -> None:
    writer = CheckpointWriter(ParallelMesh.single(), "sync", lambda _: None)
    writer.prepare({"model/x": one(torch.ones(3))})
    writer.save(1, str(tmp_path / "1"), {"model/x": one(torch.ones(3))}, {})
    with pytest.raises(
        ValueError, match="the layout of the state changed since the first save"
    ):
        writer.save(2, str(tmp_path / "2"), {"model/x": one(torch.ones(4))}, {})


def is_busy(writer: CheckpointWriter) -> bool:
    # Read in a function, since mypy takes an attribute that it has seen true for constant.
    return writer.busy


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    gate = threading.Event()
    written = list[int]()

    def slow(report: CheckpointReport) -> None:
        gate.wait(10)
        written.append(report.step)

    writer = CheckpointWriter(ParallelMesh.single(), "async", slow)
    state = {"model/x": one(torch.ones(3))}
    writer.save(1, str(tmp_path / "1"), state, {})
    assert is_busy(writer)
    threading.Timer(0.2, gate.set).start()
    writer.save(2, str(tmp_path / "2"), state, {})
    assert written[:1] == [1]
    writer.wait()
    assert written == [1, 2]
    assert not is_busy(writer)
    writer.close()


def test_an_abandoned_save_neither_counts_nor_holds_anybody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = threading.Event()
    gate = threading.Event()
    written = list[CheckpointReport]()

    def slow(storage: LocalStorage, name: str, data: bytes) -> None:
        reached.set()
        gate.wait(10)

    monkeypatch.setattr(LocalStorage, "write_bytes_atomic", slow)
    writer = CheckpointWriter(ParallelMesh.single(), "async", written.append)
    writer.save(1, str(tmp_path / "1"), {"model/x": one(torch.ones(3))}, {})
    assert reached.wait(10)
    started = time.monotonic()
    writer.abandon()
    assert time.monotonic() - started < 1
    gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint"):
            thread.join(10)
    assert written == []


def test_an_error_in_the_thread_is_raised_by_wait_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(ParallelMesh.single(), "async", lambda _: None)
    writer.save(1, str(tmp_path / "file"), {"model/x": one(torch.ones(3))}, {})
    with pytest.raises(StorageError, match="Not a directory"):
        writer.wait()
    writer.wait()
    writer.save(2, str(tmp_path / "file"), {"model/x": one(torch.ones(3))}, {})
    with pytest.raises(StorageError, match="Not a directory"):
        writer.close()


def test_object_storage_holds_checkpoints_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_objects(path: str) -> ObjectStorage:
        return ObjectStorage(path, fs.LocalFileSystem(), path)

    for module in ("writer", "load", "directory"):
        monkeypatch.setattr(f"megatron_ray.checkpoint.{module}.open_storage", as_objects)
    full = torch.randn(8, 3)
    path = saved(tmp_path / "c", {"model/x": one(full)})
    target = torch.zeros(8, 3)
    load_into(path, {"model/x": one(target)})
    assert torch.equal(target, full)
