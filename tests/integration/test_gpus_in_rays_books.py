"""Whoever takes over a dead rank's post uses its GPU, though Ray's books give it none.

Ray counts GPUs that are not there.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.parallel_dims import ParallelDims
from tests.integration.fake_service import NAMESPACE
from workers.decisions.placement import Bundle, PlacementPlan, assign_ranks
from workers.decisions.slot_assignment import assign_slots, spares_to_start
from workers.rank.environment import RankEnv
from workers.rank.messages import Fence, StartOrder

pytestmark = pytest.mark.ray
NUM_GPUS = 2

FENCE = Fence(1, 1)
PLAN = PlacementPlan(
    "gpu",
    (Bundle(0, {"CPU": 2.0, "GPU": 2.0}, (0, 1)),),
    {"CPU": 1.0, "GPU": 1.0},
    ParallelDims(tp=2),
    capacity=1,
)


def order(path: Path, gpu: int | None) -> StartOrder:
    return StartOrder(RankEnv(0, 1, 0, 1), {"said": str(path)}, {}, 1, "cuda", gpu=gpu)


def seen(group: Any, slot: int, path: Path, gpu: int | None) -> str:
    """What the process of a slot sees once its attempt has run."""
    group.start(FENCE, {slot: order(path, gpu)}, 60, lambda: None)
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return path.read_text()


def test_the_one_that_stands_by_sees_the_dead_ones_gpu(
    ray_cluster: str, tmp_path: Path
) -> None:
    from tests.integration.fake_job import GpuTeller
    from workers.ray.worker_group import WorkerGroup

    group = WorkerGroup("job-gpus", NAMESPACE, GpuTeller)
    assert group.placement_group(PLAN).wait(30)
    try:
        first = assign_slots(PLAN, (), (), (), group.nodes(PLAN))
        group.create(PLAN, first.workers_to_start, 1)
        places = assign_ranks(
            first.apply(group.probe(first.slots, FENCE, 60, lambda: None)), PLAN.dims
        )
        assert sorted(place.gpu for place in places) == [0, 1], (
            "Ray gave each one of its own"
        )
        group.create(PLAN, spares_to_start(PLAN, places, group.slots, ()), 1)
        (waiting,) = group.probe([2], FENCE, 60, lambda: None)
        assert (waiting.gpu, waiting.is_spare, waiting.bundle) == (None, True, 0)

        dead = places[1]
        group.kill_slots([dead.slot])
        second = assign_slots(PLAN, places, group.slots, [waiting], group.nodes(PLAN))
        assert second.promoted == (2,)
        assert second.workers_to_start == ()
        facts = second.apply(group.probe(second.slots, FENCE, 60, lambda: None))
        again = {place.slot: place for place in assign_ranks(facts, PLAN.dims)}
        assert again[2].gpu == dead.gpu
        assert seen(group, 2, tmp_path / "stepped-in", again[2].gpu) == str(dead.gpu)
        assert seen(group, places[0].slot, tmp_path / "survivor", places[0].gpu) == str(
            places[0].gpu
        )

        group.kill_slots([places[0].slot])
        third = assign_slots(
            PLAN, tuple(again.values()), group.slots, [], group.nodes(PLAN)
        )
        group.create(PLAN, third.workers_to_start, 1)
        (recruit,) = third.workers_to_start
        (fresh,) = [
            facts
            for facts in third.apply(group.probe(third.slots, FENCE, 60, lambda: None))
            if facts.slot == recruit.slot
        ]
        assert fresh.gpu == places[0].gpu, (
            "not the one that Ray's books call free and the other is using"
        )
        assert seen(group, recruit.slot, tmp_path / "fresh", fresh.gpu) == str(
            places[0].gpu
        )
    finally:
        group.remove_all(3)
