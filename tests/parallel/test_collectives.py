"""Collectives that are our own arithmetic on gloo's messages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ray import collectives

pytestmark = pytest.mark.parallel


def sums(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows apart, a flat part in its place with another sum under way, and what the others' places hold afterwards."""
    group = dist.group.WORLD
    rows = torch.arange(world_size * 6.0).view(world_size * 2, 3) + 100 * rank
    scattered, pending = collectives.start_reduce_scatter_rows(rows, group)
    flat = torch.arange(world_size * 4.0) * (rank + 1)
    before, own = flat.clone(), flat[rank * 4 : rank * 4 + 4]
    second = collectives.start_reduce_scatter_into(own, flat, group)
    assert not second.is_completed()
    pending.wait()
    second.wait()
    assert second.is_completed()
    mine = torch.zeros(len(flat), dtype=torch.bool)
    mine[rank * 4 : rank * 4 + 4] = True
    return scattered, own, (flat - before)[~mine]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_each_rank_gets_the_sum_of_its_part(ranks: int, run_ranks: Callable[..., list[Any]]) -> None:
    hundreds = 100 * sum(range(ranks))
    for rank, (scattered, own, others) in enumerate(run_ranks(sums, ranks)):
        expected = torch.arange(6.0).view(2, 3) + 6 * rank
        assert torch.equal(scattered, ranks * expected + hundreds)
        assert torch.equal(own, (torch.arange(4.0) + 4 * rank) * sum(range(1, ranks + 1)))
        assert not others.any()
