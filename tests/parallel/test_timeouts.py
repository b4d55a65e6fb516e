"""Collectives fail after the time that the spec gives them, also once it has changed."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch

from megatron_ray.distributed import collectives
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.parallel_dims import ParallelDims

pytestmark = pytest.mark.parallel


def wait_for_a_late_rank(rank: int, world_size: int) -> tuple[float, str]:
    # Three ranks: two exchange messages on CPU, which keep their timeout.
    world = World(rank, world_size, rank, "cpu")
    mesh = ParallelMesh.create(ParallelDims(tp=3), world, timedelta(seconds=50))
    mesh.set_timeout(timedelta(seconds=1))
    if rank == 2:
        time.sleep(2.5)
        return 0.0, ""
    began = time.monotonic()
    try:
        collectives.all_reduce(torch.ones(1), mesh.tp_group)
    except RuntimeError as error:
        return time.monotonic() - began, str(error)
    return time.monotonic() - began, ""


def test_a_mesh_can_shorten_its_timeout_after_the_start(run_ranks: Any) -> None:
    waits = run_ranks(wait_for_a_late_rank, 3)
    assert 0.9 < min(waits[:2])[0] < 2.4
    assert "1000ms" in waits[0][1] + waits[1][1]
