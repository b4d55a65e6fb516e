"""Real ranks measure their device and the links among them."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ray.commands import Command
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.distributed.speed import Sizes, SpeedTest
from megatron_ray.distributed.stores import HashStore, serve_store
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.reports import Report, SpeedReport
from workers.decisions.placement import RankPlace
from workers.decisions.preflight.judgement import Limits, judge
from workers.decisions.preflight.orders import preflight_orders
from workers.decisions.preflight.speeds import RankSpeeds
from workers.preflight import Preflight
from workers.rank.environment import RankEnv
from workers.rank.messages import StartRequest
from workers.rank.session import process_group, run_preflight

pytestmark = pytest.mark.parallel

NODES = ("node-a", "node-a", "node-b", "node-c")
TINY = Sizes(rows=64, memory_bytes=1 << 16, message_bytes=1 << 12, seconds=0.02)
SLOW_CLOCK = 1000.0
"""How much faster a clock goes on a slow rank: far more than a busy machine's noise."""
NUM_ATTEMPTS = 6
LATE_S = 0.1


def measured(rank: int, world_size: int, slow_rank: int) -> list[dict[str, Any]]:
    """Measures with one rank whose clock makes all that it does slow."""
    reports: list[dict[str, Any]] = []

    def report(item: Report) -> None:
        assert isinstance(item, SpeedReport)
        reports.append(vars(item))

    def clock() -> float:
        factor = SLOW_CLOCK if rank == slow_rank else 1.0
        return factor * time.perf_counter()

    order = preflight_orders(NODES, 30.0)[rank]
    test = SpeedTest(torch.device("cpu"), torch.float32, clock, TINY)
    assert Preflight(order, test, report).run()
    return reports


def measured_then_trained(rank: int, world_size: int) -> list[str]:
    """Measures, then creates groups of the same ranks; one rank is late with these.

    Which of two ranks connects to the other is chance, hence several attempts.
    """
    store = serve_store("127.0.0.1") if rank == 0 else None
    ports = [store.port if store else 0]
    dist.broadcast_object_list(ports)
    dist.destroy_process_group()
    parts: list[str] = []

    def report(item: Report) -> None:
        assert isinstance(item, SpeedReport)
        parts.append(item.part)

    test = SpeedTest(torch.device("cpu"), torch.float32, sizes=TINY)
    timeout = timedelta(seconds=5)
    for attempt in range(NUM_ATTEMPTS):
        request = StartRequest(
            RankEnv(rank, world_size, rank, world_size),
            {},
            {},
            attempt,
            "cpu",
            store=("127.0.0.1", ports[0]),
            preflight=preflight_orders(["node-a"] * world_size, 30.0)[rank],
        )
        assert run_preflight(request, test, report, lambda: Command.CONTINUE, timeout)
        if rank == attempt % world_size:
            time.sleep(LATE_S)
        with process_group(request, timeout):
            world = World(rank, world_size, rank, "cpu")
            ParallelMesh.create(ParallelDims(tp=world_size), world, timeout)
    # The harness, which waits until all ranks have returned, destroys a default group.
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    return parts


def place(rank: int) -> RankPlace:
    return RankPlace(
        rank=rank,
        slot=rank,
        bundle=rank,
        node_id=NODES[rank],
        address=f"192.0.2.{'abc'.index(NODES[rank][-1]) + 1}",
        gpu=None,
        pid=rank,
        local_rank=0,
        local_world_size=1,
        node_rank=0,
        coordinates={},
    )


def test_every_part_is_measured_and_a_slow_rank_is_named(
    run_ranks: Callable[..., list[Any]],
) -> None:
    rows = run_ranks(measured, len(NODES), 3)
    parts = [[(row["part"], row["peer"]) for row in reports] for reports in rows]
    assert parts[1] == [("device", None), ("node", None), ("world", None)]
    assert parts[2][:1] == [("device", None)]
    assert set(parts[2][1:-1]) == {("link", 0), ("link", 3)}
    speeds = {}
    for rank, reports in enumerate(rows):
        assert all(row["bytes_per_s"] > 0 and row["problem"] is None for row in reports)
        assert reports[0]["flops"] > 0
        assert reports[0]["device"] == rows[0][0]["device"] != ""
        known = RankSpeeds(rank)
        for row in reports:
            known = known.with_report(row)
        speeds[rank] = known
    places = [place(rank) for rank in range(len(NODES))]
    # On a busy machine equal ranks may differ by a factor, but not by a thousand.
    verdict = judge(places, speeds, Limits(0.02, 30.0, "fp32"))
    assert verdict.blocked is None
    assert [node.node_id for node in verdict.bad] == ["node-c"]
    assert "matmul" in verdict.bad[0].reason
    assert len(verdict.links) == 3
    assert verdict.all_reduce_bytes_per_s is not None


def test_training_does_not_meet_the_groups_of_the_measurements(
    run_ranks: Callable[..., list[Any]],
) -> None:
    assert run_ranks(measured_then_trained, 2) == [["device", "node"] * NUM_ATTEMPTS] * 2
