"""A process that replaces a dead rank uses its GPU, though Ray assigns it none.

Ray counts GPUs that are not there.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.parallel_dims import ParallelDims
from tests.support.fake_service import NAMESPACE
from workers.decisions.placement import PlacementPlan
from workers.decisions.rank_map import assign_ranks
from workers.decisions.slot_assignment import assign_slots, spares_to_start
from workers.decisions.topology.bundles import Bundle
from workers.rank.environment import RankEnv
from workers.rank.messages import Fence, StartRequest

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


def no_stop() -> None:
    """The wait for the workers is never ended early."""


def visible_gpus(group: Any, slot: int, path: Path, gpu: int | None) -> str:
    """CUDA_VISIBLE_DEVICES in the process of a slot once its attempt has run."""
    request = StartRequest(RankEnv(0, 1, 0, 1), {"path": str(path)}, {}, 1, "cuda", gpu=gpu)
    group.start(FENCE, {slot: request}, 60, no_stop)
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return path.read_text()


def test_a_promoted_or_new_process_uses_the_dead_ones_gpu(
    ray_cluster: str, tmp_path: Path
) -> None:
    from tests.support.fake_job import GpuTeller
    from workers.ray.worker_group import WorkerGroup

    group = WorkerGroup("job-gpus", NAMESPACE, GpuTeller)
    assert group.placement_group(PLAN).wait(30)
    try:
        first = assign_slots(PLAN, (), (), (), group.nodes(PLAN))
        group.create(PLAN, first.workers_to_start, 1)
        facts = first.apply(group.probe(first.slots, FENCE, 60, no_stop))
        places = assign_ranks(facts, PLAN.dims)
        ranks_by_gpu = Counter(place.gpu for place in places)
        assert ranks_by_gpu == {0: 1, 1: 1}, "Ray assigned one to each"

        # A spare takes no GPU from Ray.
        group.create(PLAN, spares_to_start(PLAN, places, group.slots, ()), 1)
        (spare,) = group.probe([2], FENCE, 60, no_stop)
        assert (spare.gpu, spare.is_spare, spare.bundle) == (None, True, 0)

        # It is promoted when rank 1 dies, and uses the dead one's GPU.
        survivor = places[0]
        dead = places[1]
        group.kill_slots([dead.slot])
        second = assign_slots(PLAN, places, group.slots, [spare], group.nodes(PLAN))
        assert second.promoted == (2,)
        assert second.workers_to_start == ()
        facts = second.apply(group.probe(second.slots, FENCE, 60, no_stop))
        places = assign_ranks(facts, PLAN.dims)
        gpus = {place.slot: place.gpu for place in places}
        assert gpus[2] == dead.gpu
        assert visible_gpus(group, 2, tmp_path / "promoted", gpus[2]) == str(dead.gpu)
        gpu = visible_gpus(group, survivor.slot, tmp_path / "survivor", survivor.gpu)
        assert gpu == str(survivor.gpu)

        # Without a spare, a new process uses it: not the one that Ray counts as free
        # while the promoted process uses it.
        group.kill_slots([survivor.slot])
        third = assign_slots(PLAN, places, group.slots, [], group.nodes(PLAN))
        group.create(PLAN, third.workers_to_start, 1)
        (new,) = third.workers_to_start
        facts = third.apply(group.probe(third.slots, FENCE, 60, no_stop))
        (gpu_of_new,) = [item.gpu for item in facts if item.slot == new.slot]
        assert gpu_of_new == survivor.gpu
        gpu = visible_gpus(group, new.slot, tmp_path / "new", gpu_of_new)
        assert gpu == str(survivor.gpu)
    finally:
        group.remove_all(3)
