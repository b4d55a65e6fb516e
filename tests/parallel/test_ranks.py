"""The launcher of ranks itself: results, errors, deaths and hangs."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankFailedError

pytestmark = pytest.mark.parallel


@dataclass(frozen=True)
class Pair:
    """A class of a test module, to be pickled both ways."""

    left: int
    right: torch.Tensor


def add_up(rank: int, world_size: int, pair: Pair) -> Pair:
    total = pair.right * (rank + 1)
    dist.all_reduce(total)
    return Pair(pair.left + rank, total)


def fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one gives up")
    dist.barrier()


def die_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    time.sleep(30)


def hang_on_one(rank: int, world_size: int) -> int:
    if rank == 1:
        time.sleep(30)
    return os.getpid()


def threads(rank: int, world_size: int) -> int:
    return torch.get_num_threads()


def test_sixteen_ranks_compute_and_answer_in_order(
    run_ranks: Callable[..., list[Any]],
) -> None:
    results = run_ranks(add_up, 16, Pair(100, torch.ones(3)))
    assert [result.left for result in results] == list(range(100, 116))
    assert all(torch.equal(result.right, torch.full((3,), 136.0)) for result in results)


def test_a_rank_uses_one_thread(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(threads, 1) == [1]


def test_the_first_error_is_raised_with_its_traceback(
    run_ranks: Callable[..., list[Any]],
) -> None:
    with pytest.raises(ValueError, match="rank one gives up") as caught:
        run_ranks(fail_on_one, 3)
    assert isinstance(caught.value.__cause__, RankFailedError)
    assert "in fail_on_one" in str(caught.value.__cause__)


def test_a_dead_rank_is_named(run_ranks: Callable[..., list[Any]]) -> None:
    with pytest.raises(RankFailedError, match="rank 1 died with exit code 7"):
        run_ranks(die_on_one, 2)


def test_a_hang_ends_at_the_timeout_with_the_stack(
    run_ranks: Callable[..., list[Any]],
) -> None:
    with pytest.raises(
        TimeoutError, match=r"(?s)ranks \[1\] of 2 gave no answer in 3.0 s.*in hang_on_one"
    ):
        run_ranks(hang_on_one, 2, timeout_s=3.0)
