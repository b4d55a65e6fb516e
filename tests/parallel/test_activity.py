"""What real ranks record of themselves, and what follows: who is stuck, who is slow."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ray.distributed import collectives
from megatron_ray.distributed.activity import PROCESS
from megatron_ray.distributed.recording import name_groups
from megatron_ray.training.reporting.step_timer import HostTimer
from workers.decisions.ranks.diagnosis import Confidence, RankEvidence, diagnose
from workers.decisions.ranks.stragglers import WINDOW_S, WINDOWS, Pace, StragglerWatch
from workers.rank.evidence import gather_evidence

pytestmark = pytest.mark.parallel

BLOCKED_S = 0.7
"""Longer than the ranks need to come to their waits."""


def read_block() -> None:
    """Stands for user code that does not return."""
    time.sleep(BLOCKED_S)


def examined(work: Callable[[], None]) -> RankEvidence:
    """Runs the work in another thread; returns what it does in the middle of it."""
    thread = threading.Thread(target=work, name="attempt-1")
    thread.start()
    time.sleep(BLOCKED_S / 2)
    evidence = gather_evidence(dist.get_rank(), 3, thread, has_ended=False)
    thread.join()
    return evidence


def reductions(rank: int, world_size: int) -> RankEvidence:
    """Rank 1 stays in its own code before the third reduction."""
    group = dist.group.WORLD
    name_groups({"dp": group})

    def work() -> None:
        for number in range(3):
            if rank == 1 and number == 2:
                read_block()
            collectives.all_reduce(torch.ones(4), group)

    return examined(work)


def test_a_rank_in_its_own_code_is_named(run_ranks: Callable[..., list[Any]]) -> None:
    rows = run_ranks(reductions, 3)
    diagnosis = diagnose(dict(enumerate(rows)), 60.0, is_hang=True)
    assert (diagnosis.culprits, diagnosis.confidence) == ((1,), Confidence.HIGH)
    assert "has not entered all_reduce 3 of dp" in diagnosis.reason
    assert "read_block (" in diagnosis.reason
    for rank in (0, 2):
        assert rows[rank].wait.operation == "all_reduce"
        assert "recording.py" in rows[rank].frames[0].file
        assert rows[rank].memory_bytes > 0


def stages(rank: int, world_size: int) -> RankEvidence:
    """A pipeline of three: the first stage does not send its second message."""
    group = dist.group.WORLD
    name_groups({"pp": group})

    def work() -> None:
        for number in range(2):
            message = torch.ones(4)
            if rank > 0:
                collectives.start_receive(message, rank - 1, group).wait()
            elif number == 1:
                read_block()
            if rank + 1 < world_size:
                collectives.start_send(message, rank + 1, group).wait()

    return examined(work)


def test_the_stage_that_does_not_send_is_named(run_ranks: Callable[..., list[Any]]) -> None:
    rows = run_ranks(stages, 3)
    diagnosis = diagnose(dict(enumerate(rows)), 60.0, is_hang=True)
    assert diagnosis.culprits == (0,)
    assert "message 2 of pp (receive)" in diagnosis.reason
    assert rows[2].wait.peer == 1


def steps(rank: int, world_size: int) -> Pace:
    """Five steps with a reduction each; rank 1 works ten times as long."""
    group = dist.group.WORLD
    name_groups({"dp": group})
    collectives.barrier(group, torch.device("cpu"))
    timer = HostTimer()
    for _ in range(5):
        time.sleep(0.15 if rank == 1 else 0.015)
        collectives.all_reduce(torch.ones(4), group)
        timer.finish()
    return Pace(PROCESS.steps, PROCESS.own_s, PROCESS.step_s)


def test_own_times_show_the_slow_rank_and_step_times_do_not(
    run_ranks: Callable[..., list[Any]],
) -> None:
    paces = run_ranks(steps, 3)
    assert [pace.steps for pace in paces] == [5, 5, 5]
    assert min(pace.step_s for pace in paces) > 0.6 * max(pace.step_s for pace in paces)
    assert paces[1].own_s > 1.5 * max(paces[0].own_s, paces[2].own_s)
    watch = StragglerWatch(((0, 1, 2),), 0.0)
    for window in range(WINDOWS + 1):
        so_far = {}
        for rank, pace in enumerate(paces):
            so_far[rank] = Pace(
                window * pace.steps, window * pace.own_s, window * pace.step_s
            )
        watch = watch.observed(window * WINDOW_S, so_far)
    assert list(watch.slow) == [1]
