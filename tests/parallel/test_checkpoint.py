"""Checkpoints on real ranks: any layout in, any layout out, bit for bit; what is torn
or fails is seen.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ray.checkpoint.directory import (
    CheckpointError,
    checkpoint_path,
    commit,
    latest_committed,
    read_manifest,
)
from megatron_ray.checkpoint.load import load_into
from megatron_ray.checkpoint.train_state import read_train_state
from megatron_ray.checkpoint.writer import CheckpointWriter
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.reports import CheckpointReport
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.flat_boxes import flat_range_to_boxes
from megatron_ray.sharding.sharded_state import ShardedState, ShardedTensor, TensorBox
from megatron_ray.storage.errors import StorageError
from tests.support.ranks import RankFailedError

pytestmark = pytest.mark.parallel
Run = Callable[..., list[Any]]

SHAPES: dict[str, tuple[int, ...]] = {
    "model/a": (24, 10),
    "model/norm": (10,),
    "optimizer/exp_avg/a": (24, 10),
    "model/scale": (),
}


def truth(name: str) -> torch.Tensor:
    dtype = torch.bfloat16 if name == "model/norm" else torch.float32
    return torch.randn(
        SHAPES[name],
        generator=torch.Generator().manual_seed(len(name)),
        dtype=torch.float32,
    ).to(dtype)


def box_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(box.offset, box.size, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def boxes_of(layout: str, shape: tuple[int, ...], rank: int, world_size: int) -> list[Box]:
    """`rows` and `columns` as tensor parallelism cuts, `flat` as a ZeRO-1 shard,
    `whole` on every rank; small ones replicated.
    """
    if layout == "whole" or len(shape) < 2:
        return [Box((0,) * len(shape), shape)]
    if layout == "rows":
        rows = shape[0] // world_size
        return [Box((rank * rows, 0), (rows, shape[1]))]
    if layout == "columns":
        columns = shape[1] // world_size
        return [Box((0, rank * columns), (shape[0], columns))]
    elements = shape[0] * shape[1] // world_size
    start = rank * elements
    return [box for box, _, _ in flat_range_to_boxes(shape, start, start + elements)]


def cut(layout: str, rank: int, world_size: int, *, filled: bool) -> ShardedState:
    state: ShardedState = {}
    for name, shape in SHAPES.items():
        full = truth(name)
        boxes = []
        for box in boxes_of(layout, shape, rank, world_size):
            tensor = torch.zeros(box.size, dtype=full.dtype)
            if filled:
                tensor = box_of(full, box).clone()
            boxes.append(TensorBox(box, tensor))
        state[name] = ShardedTensor(shape, boxes)
    return state


def mesh(rank: int, world_size: int) -> ParallelMesh:
    return ParallelMesh.create(
        ParallelDims(dp=world_size), World(rank, world_size, rank, "cpu")
    )


def save(
    rank: int, world_size: int, layout: str, path: str, mode: str = "async"
) -> tuple[list[CheckpointReport], float, bool]:
    reports: list[CheckpointReport] = []
    writer = CheckpointWriter(
        mesh(rank, world_size), "async" if mode == "async" else "sync", reports.append
    )
    state = cut(layout, rank, world_size, filled=True)
    rng = {"cpu": f"stream of {rank}"}
    writer.save(
        5, path, state, {"format_version": 1, "step": 5, "consumed_samples": 40, "rng": rng}
    )
    for tensor in state.values():
        for local in tensor.boxes:
            local.tensor.fill_(-1.0)  # the save has its own copy
    start = time.monotonic()
    writer.close()
    return reports, time.monotonic() - start, writer.busy


def load(rank: int, world_size: int, layout: str, path: str) -> list[str]:
    """Names of tensors that are not bit-equal."""
    state = cut(layout, rank, world_size, filled=False)
    load_into(path, state)
    wrong = []
    for name, tensor in state.items():
        for local in tensor.boxes:
            if not torch.equal(local.tensor, box_of(truth(name), local.box)):
                wrong.append(name)
    return wrong


def train_state(rank: int, world_size: int, path: str) -> dict[str, Any]:
    return read_train_state(path, rank)


@pytest.mark.parametrize("layout", ["flat", "rows", "whole"])
def test_every_layout_loads_under_every_other(
    run_ranks: Run, tmp_path: Path, layout: str
) -> None:
    path = checkpoint_path(str(tmp_path), 5, 1)
    answers = run_ranks(save, 4, layout, path)
    assert all(
        [report.step for report in reports] == [5] and reports[0].path == path
        for reports, _, _ in answers
    )
    commit(path, {"step": 5}, [])
    elements = (
        sum(
            4 * 240 if name != "model/norm" else 20
            for name in ("model/a", "optimizer/exp_avg/a", "model/norm")
        )
        + 4
    )
    data = sum(
        size
        for name, size in read_manifest(path)["files"].items()
        if name.startswith("data/")
    )
    assert data <= elements + 64 * 12, "replicas are written once"
    for world_size, layout in (
        (1, "whole"),
        (2, "columns"),
        (2, "flat"),
        (4, "rows"),
        (3, "flat"),
    ):
        assert run_ranks(load, world_size, layout, path) == [[]] * world_size


def test_a_file_uri_and_sync_mode_are_the_same(run_ranks: Run, tmp_path: Path) -> None:
    path = checkpoint_path(f"file://{tmp_path}", 5, 1)
    run_ranks(save, 2, "flat", path, "sync")
    commit(path, {}, [])
    assert run_ranks(load, 1, "whole", path) == [[]]


def test_ranks_get_their_own_random_stream_and_new_ranks_none(
    run_ranks: Run, tmp_path: Path
) -> None:
    path = checkpoint_path(str(tmp_path), 5, 1)
    run_ranks(save, 2, "rows", path)
    commit(path, {}, [])
    states = run_ranks(train_state, 3, path)
    assert [state["step"] for state in states] == [5, 5, 5]
    assert [state.get("rng") for state in states] == [
        {"cpu": "stream of 0"},
        {"cpu": "stream of 1"},
        None,
    ]


def test_an_uncommitted_checkpoint_is_refused(run_ranks: Run, tmp_path: Path) -> None:
    path = checkpoint_path(str(tmp_path), 5, 1)
    run_ranks(save, 2, "rows", path)
    with pytest.raises(CheckpointError, match="it is not committed"):
        run_ranks(load, 1, "whole", path)
    with pytest.raises(CheckpointError, match="it is not committed"):
        read_train_state(path, 0)


def die(fd: Any) -> None:
    os._exit(9)


def die_while_writing(rank: int, world_size: int, path: str) -> None:
    if rank == 1:
        os.fsync = die  # killed when the bytes are written and not yet durable
    save(rank, world_size, "rows", path)


def test_a_rank_that_dies_while_writing_leaves_nothing_that_counts(
    run_ranks: Run, tmp_path: Path
) -> None:
    path = checkpoint_path(str(tmp_path), 5, 1)
    with pytest.raises(RankFailedError, match="rank 1 died with exit code 9"):
        run_ranks(die_while_writing, 2, path)
    assert not Path(path, "data", "rank-00001.bin").exists()
    with pytest.raises(
        CheckpointError, match=r"cannot commit .*: its file data/rank-00001.bin is missing"
    ):
        commit(path, {}, [])
    assert latest_committed(str(tmp_path)) is None
    run_ranks(save, 2, "rows", path)
    commit(path, {}, [])
    assert run_ranks(load, 1, "whole", path) == [[]]


def uncovered(rank: int, world_size: int, path: str) -> None:
    writer = CheckpointWriter(mesh(rank, world_size), "sync", lambda _: None)
    state: ShardedState = {
        "model/a": ShardedTensor(
            (4, 2), [TensorBox(Box((rank, 0), (1, 2)), torch.zeros(1, 2))]
        )
    }
    writer.save(1, path, state, {})


def test_boxes_that_do_not_cover_are_refused_on_every_rank(
    run_ranks: Run, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"model/a"):
        run_ranks(uncovered, 2, str(tmp_path / "c"))


def fail_in_background(
    rank: int, world_size: int, blocked: str, good: str
) -> tuple[str, int]:
    reports: list[CheckpointReport] = []
    writer = CheckpointWriter(mesh(rank, world_size), "async", reports.append)
    state = cut("rows", rank, world_size, filled=True)
    writer.save(1, blocked, state, {"format_version": 1})
    try:
        writer.save(2, good, state, {"format_version": 1})
    except StorageError as error:
        message = str(error)
    writer.save(3, good, state, {"format_version": 1})
    writer.close()
    return message, len(reports)


def test_an_error_in_the_thread_surfaces_at_the_next_save_once(
    run_ranks: Run, tmp_path: Path
) -> None:
    (tmp_path / "blocked").write_text("a file where a folder should be")
    answers = run_ranks(
        fail_in_background, 2, str(tmp_path / "blocked"), str(tmp_path / "good")
    )
    assert all(
        "cannot write" in message and "blocked" in message and count == 1
        for message, count in answers
    )
    assert not (tmp_path / "blocked" / "index.json").exists()
