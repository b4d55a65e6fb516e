"""Memory of a save and of a load under another layout: measured on real ranks by the
kernel's own high-water mark.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ray.checkpoint.directory import commit
from megatron_ray.checkpoint.load import load_into
from megatron_ray.checkpoint.writer import CheckpointWriter
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.sharded_state import ShardedState, ShardedTensor, TensorBox

pytestmark = pytest.mark.parallel
Run = Callable[..., list[Any]]

SHAPE = (4096, 4096)
TENSORS = 4
MIB = 1024 * 1024


def memory_bytes(field: str) -> int:
    """`VmRSS` now, or `VmHWM` since the last `forget_peak`."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def shard(rank: int, world_size: int, dim: int) -> ShardedState:
    """Equal parts along a dimension, every page touched."""
    size = list(SHAPE)
    offset = [0, 0]
    size[dim] //= world_size
    offset[dim] = rank * size[dim]
    box = Box((offset[0], offset[1]), (size[0], size[1]))
    return {
        f"model/{index}": ShardedTensor(SHAPE, [TensorBox(box, torch.ones(box.size))])
        for index in range(TENSORS)
    }


def shard_bytes(world_size: int) -> int:
    return TENSORS * SHAPE[0] * SHAPE[1] * 4 // world_size


def measure_save(rank: int, world_size: int, path: str) -> int:
    mesh = ParallelMesh.create(
        ParallelDims(dp=world_size), World(rank, world_size, rank, "cpu")
    )
    state = shard(rank, world_size, 0)
    writer = CheckpointWriter(mesh, "async", lambda _: None)
    before = memory_bytes("VmRSS")
    forget_peak()
    for step in (1, 2):
        writer.save(step, path, state, {"format_version": 1})
    writer.close()
    return memory_bytes("VmHWM") - before


def measure_load(rank: int, world_size: int, path: str) -> int:
    state = shard(rank, world_size, 1)
    before = memory_bytes("VmRSS")
    forget_peak()
    load_into(path, state)
    return memory_bytes("VmHWM") - before


def test_saving_and_loading_need_little_more_than_the_shard(
    run_ranks: Run, tmp_path: Path
) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux to measure a peak")
    limit = 1.2 * shard_bytes(2) + 64 * MIB
    saving = run_ranks(measure_save, 2, str(tmp_path))
    commit(str(tmp_path), {}, [])
    loading = run_ranks(measure_load, 2, str(tmp_path))
    assert max(saving) <= limit, f"{max(saving) // MIB} MiB"
    assert max(loading) <= 64 * MIB, (
        f"{max(loading) // MIB} MiB: a load goes through bounded scratch memory"
    )
