"""At which sizes an elastic job runs: possible sizes, shrinking, growing."""

from typing import Any

import pytest

from megatron_ray.config.schedules.batch_sizes import RampupConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.validation.resolution import resolve_dp
from workers.decisions import elasticity
from workers.decisions.elasticity import GrowthFacts, Shortage
from workers.decisions.placement import PlacementPlan
from workers.decisions.topology.bundles import Bundle
from workers.protocol.job import JobSpec


def spec_of(batch: int = 12, **parallel: Any) -> JobSpec:
    return JobSpec.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "parallel": {"tp": 2, "dp": 4, **parallel},
            "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
            "training": {
                "seq_length": 16,
                "micro_batch_size": 1,
                "global_batch_size": batch,
                "steps": 10,
            },
            "optimizer": {"lr": 0.001},
            "elastic": {"min_dp": 2, "max_dp": 8},
        }
    )


def test_possible_sizes_divide_the_batch_and_complete_the_grid() -> None:
    assert elasticity.legal_dps(spec_of()) == (2, 3, 4, 6)
    assert elasticity.legal_dps(spec_of(batch=7)) == (7,)
    fixed = spec_of().model_copy(update={"elastic": None})
    assert elasticity.legal_dps(fixed) == ()


def test_possible_sizes_divide_every_batch_of_a_ramp_up() -> None:
    rampup = RampupConfig(start=4, increment=4, samples=80)
    spec = spec_of()
    training = spec.training.model_copy(update={"rampup_batch_size": rampup})
    growing = spec.model_copy(update={"training": training})
    assert elasticity.legal_dps(growing) == (2, 4)
    # So does the size that is chosen for a world.
    parallel = growing.parallel.model_copy(update={"dp": "auto"})
    open_size = growing.model_copy(update={"parallel": parallel})
    assert resolve_dp(spec.model_copy(update={"parallel": parallel}), 12) == 6
    assert resolve_dp(open_size, 12) == 4
    elastic = growing.elastic
    assert elastic is not None
    bounds = elastic.model_copy(update={"min_dp": 5})
    impossible = open_size.model_copy(update={"elastic": bounds})
    (problem,) = elasticity.elastic_problems(impossible)
    assert "must divide global_batch_size=12 and each batch size of rampup_batch_size" in (
        problem.detail
    )


def test_jobs_that_synchronize_have_one_size() -> None:
    spec = spec_of()
    fields = spec.parallel.model_dump(exclude_unset=True)
    meeting = {"path": "/shared/meeting", "group": 0}
    fields["local_sgd"] = {"groups": 2, "sync_every": 8, "rendezvous": meeting}
    parallel = type(spec.parallel).model_validate(fields)
    (problem,) = elasticity.elastic_problems(spec.model_copy(update={"parallel": parallel}))
    assert problem.pointer == "/elastic"
    assert problem.detail == (
        "the other jobs of parallel.local_sgd.rendezvous need as many replicas as this one; "
        "leave elastic out: the others go on when this job is lost"
    )


@pytest.mark.parametrize(
    ("ranks", "has_room", "waited_s", "dp"),
    [
        (6, False, 0.0, 3),  # no room elsewhere: at once
        (5, False, 0.0, 2),
        (6, True, 0.0, None),  # Ray moves the lost bundle
        (6, True, elasticity.REPLACE_S, 3),  # it has not done so: other jobs are there
        (2, False, 0.0, None),  # below min_dp
        (0, False, 1000.0, None),
    ],
)
def test_a_job_shrinks_when_waiting_does_not_help(
    ranks: int, has_room: bool, waited_s: float, dp: int | None
) -> None:
    shortage = Shortage(2, ranks, has_room, waited_s)
    assert elasticity.shrunk_dp(spec_of(), shortage) == dp


def test_a_replica_needs_all_of_its_stages_and_uses_whole_bundles() -> None:
    # dp=4 of 2 stages of 2 ranks each.
    spec = spec_of(pp=2)
    assert elasticity.shrunk_dp(spec, Shortage(2, 14, False, 0.0)) == 3
    assert elasticity.shrunk_dp(spec, Shortage(2, 10, False, 0.0)) == 2
    # A node of 8 ranks is a bundle.
    assert elasticity.shrunk_dp(spec, Shortage(8, 14, False, 0.0)) == 2
    assert elasticity.shrunk_dp(spec, Shortage(8, 7, False, 0.0)) is None


@pytest.mark.parametrize(
    ("size", "tp", "present", "living", "expected"),
    [
        (2, 2, {0, 1, 3}, {3}, [3, 0, 1]),
        (4, 2, {1}, {1}, [1]),
        # Islands of two bundles, one NVLink domain each.
        (2, 4, {0, 1, 3}, set(), [0, 1]),
        (2, 4, {0, 1, 2, 3}, {2}, [2, 3, 0, 1]),
    ],
)
def test_only_whole_islands_count_and_those_with_ranks_are_used_first(
    size: int, tp: int, present: set[int], living: set[int], expected: list[int]
) -> None:
    dims = ParallelDims(tp=tp, dp=8 // tp)
    bundles = []
    for index in range(8 // size):
        bundles.append(Bundle(index, {}, tuple(range(index * size, (index + 1) * size))))
    plan = PlacementPlan("cpu", tuple(bundles), {}, dims, capacity=8 // tp)
    whole = elasticity.whole_islands(plan, present, living)
    assert [bundle.index for bundle in whole] == expected


def facts(**changes: Any) -> GrowthFacts:
    values = {
        "dp": 2,
        "full_dp": 4,
        "steady_s": elasticity.STEADY_S,
        "step_s": 1.0,
        "remaining_steps": 1000,
        "restart_s": 20.0,
    }
    return GrowthFacts(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "grows"),
    [
        ({}, True),
        ({"steady_s": elasticity.STEADY_S - 1}, False),  # a node that flaps
        ({"remaining_steps": 100}, False),  # saves 50 s, costs 20 s
        ({"remaining_steps": 121}, True),
        ({"restart_s": 200.0}, False),
        ({"dp": 7, "full_dp": 8}, True),
        ({"dp": 63, "full_dp": 64}, False),
    ],
)
def test_a_job_grows_when_the_time_it_saves_exceeds_the_cost(
    changes: dict[str, Any], grows: bool
) -> None:
    assert elasticity.decide_growth(facts(**changes)).grow is grows


def test_the_cost_of_growing_is_part_of_the_reason() -> None:
    assert elasticity.decide_growth(facts()).message == (
        "from dp=2 to dp=4: saves up to 500 s of 1000 s, costs 20 s"
    )
