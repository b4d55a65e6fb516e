"""Collectives that are our own arithmetic on gloo's messages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ray.distributed import collectives

pytestmark = pytest.mark.parallel


def sums(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows apart, a flat part in its place with another sum under way, and what the
    others' places hold afterwards.
    """
    group = dist.group.WORLD
    rows = torch.arange(world_size * 6.0).view(world_size * 2, 3) + 100 * rank
    scattered, pending = collectives.start_reduce_scatter_rows(rows, group)
    flat = torch.arange(world_size * 4.0) * (rank + 1)
    before = flat.clone()
    own = flat[rank * 4 : rank * 4 + 4]
    second = collectives.start_reduce_scatter_into(own, flat, group)
    assert not second.is_completed()
    pending.wait()
    second.wait()
    assert second.is_completed()
    mine = torch.zeros(len(flat), dtype=torch.bool)
    mine[rank * 4 : rank * 4 + 4] = True
    return scattered, own, (flat - before)[~mine]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_each_rank_gets_the_sum_of_its_part(
    ranks: int, run_ranks: Callable[..., list[Any]]
) -> None:
    hundreds = 100 * sum(range(ranks))
    for rank, (scattered, own, others) in enumerate(run_ranks(sums, ranks)):
        expected = torch.arange(6.0).view(2, 3) + 6 * rank
        assert torch.equal(scattered, ranks * expected + hundreds)
        assert torch.equal(own, (torch.arange(4.0) + 4 * rank) * sum(range(1, ranks + 1)))
        assert not others.any()


def gathers_and_reductions(rank: int, world_size: int) -> tuple[torch.Tensor, ...]:
    group = dist.group.WORLD
    rows = torch.arange(4.0).view(2, 2) + 10 * rank
    whole = torch.full((world_size * 3,), -1.0)
    whole[3 * rank : 3 * rank + 3] = float(rank)
    in_place = collectives.start_all_gather_into(
        whole, whole[3 * rank : 3 * rank + 3], group
    )
    gathered = collectives.all_gather_rows(rows, group)
    first = torch.full((5,), 0.1 * (rank + 1))
    second = torch.tensor([rank, -rank])
    pending = collectives.start_all_reduce(first, group)
    largest = collectives.all_reduce(second, group, dist.ReduceOp.MAX)
    empty = collectives.all_reduce(torch.empty(0), group)
    for transfer in (pending, pending, in_place):
        transfer.wait()
    return gathered, whole, first, largest, empty


@pytest.mark.parametrize("ranks", [2, 3])
def test_everybody_gets_the_same(ranks: int, run_ranks: Callable[..., list[Any]]) -> None:
    results = run_ranks(gathers_and_reductions, ranks)
    for result in results:
        gathered, whole, first, largest, empty = result
        assert torch.equal(
            gathered,
            torch.cat([torch.arange(4.0).view(2, 2) + 10 * rank for rank in range(ranks)]),
        )
        assert torch.equal(whole, torch.arange(float(ranks)).repeat_interleave(3))
        torch.testing.assert_close(first, torch.full((5,), 0.1 * sum(range(1, ranks + 1))))
        assert torch.equal(first, results[0][2])
        assert largest.tolist() == [ranks - 1, 0]
        assert empty.numel() == 0
