"""Buckets and the flat partition: everything is owned once, rules are kept apart."""

import pytest

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.optimizer.partition import flat_runs, pieces
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.sharding.buckets import ALIGNMENT, default_bucket_elements, plan_buckets
from megatron_ray.sharding.parameters import freeze, local_parameters

CONFIG = OptimizerConfig(lr=1.0, weight_decay=0.1)
TABLE = local_parameters(
    ModelConfig.model_validate({"preset": "gpt2-tiny", "vocab_size": 300}),
    ParallelDims(tp=2),
    0,
)


@pytest.mark.parametrize("dp", [1, 2, 3, 8])
@pytest.mark.parametrize("bucket_elements", [1, 10_000, None])
def test_every_element_is_owned_once(dp: int, bucket_elements: int | None) -> None:
    plan = plan_buckets(TABLE, dp, bucket_elements)
    owned = [0] * plan.num_elements
    for rank in range(dp):
        runs = flat_runs(plan, CONFIG, rank, dp, sharded=True)
        assert [run.shard_start for run in runs] == [
            sum(r.end - r.start for r in runs[:i]) for i in range(len(runs))
        ]
        for run in runs:
            for index in range(run.start, run.end):
                owned[index] += 1
    assert set(owned) == {1}
    covered = sum(
        piece.end - piece.start
        for rank in range(dp)
        for piece in pieces(plan, flat_runs(plan, CONFIG, rank, dp, sharded=True))
    )
    assert covered == sum(parameter.num_elements for parameter in TABLE)


@pytest.mark.parametrize("dp", [1, 4])
def test_runs_keep_rules_apart(dp: int) -> None:
    plan = plan_buckets(TABLE, dp, 20_000)
    for rank in range(dp):
        runs = flat_runs(plan, CONFIG, rank, dp, sharded=True)
        for piece in pieces(plan, runs):
            (run,) = [run for run in runs if run.start <= piece.start < run.end]
            parameter = piece.placed.parameter
            assert (run.rule.weight_decay > 0, run.tp_sharded) == (
                parameter.parts[0].logical.decay,
                parameter.tp_sharded,
            )


def test_buckets_come_in_backward_order_and_divide_evenly() -> None:
    plan = plan_buckets(TABLE, 3, 20_000)
    assert [placed.parameter.name for placed in plan.placed] == [
        parameter.name for parameter in reversed(TABLE)
    ]
    for bucket in plan.buckets:
        assert (bucket.end - bucket.start) % (3 * ALIGNMENT) == 0
        assert all(placed.start % ALIGNMENT == 0 for placed in bucket.placed)
        assert [bucket.shard(rank, 3)[0] for rank in range(3)] == sorted(
            bucket.shard(rank, 3)[0] for rank in range(3)
        )


def test_what_is_frozen_lies_behind_the_gradients_and_belongs_to_nobody() -> None:
    table = freeze(TABLE, ["embedding.weight", "layers.[01].mlp.*"])
    plan = plan_buckets(table, 3, 20_000)
    frozen = [parameter for parameter in table if not parameter.trainable]
    assert [placed.parameter for placed in plan.frozen] == frozen
    assert len(frozen) == 9
    assert all(placed.start >= plan.num_trainable for placed in plan.frozen)
    assert plan.num_elements == plan.frozen[-1].end
    assert (
        sum(
            run.end - run.start
            for rank in range(3)
            for run in flat_runs(plan, CONFIG, rank, 3, sharded=True)
        )
        == plan.num_trainable
    )
    everything = plan_buckets(freeze(TABLE, ["*"]), 2)
    assert (
        everything.num_trainable,
        everything.buckets,
        flat_runs(everything, CONFIG, 0, 2, sharded=True),
    ) == (0, (), ())


def test_default_bucket_size_is_megatrons_but_for_small_models() -> None:
    assert default_bucket_elements(8, 10**9) == 40_000_000
    assert default_bucket_elements(100, 10**9) == 100_000_000
    assert default_bucket_elements(4, 80_000_000) == 10_000_000
    assert default_bucket_elements(4, 8_000_000) == 4_000_000


def test_without_sharding_every_rank_owns_everything() -> None:
    plan = plan_buckets(TABLE, 4)
    assert (
        sum(run.end - run.start for run in flat_runs(plan, CONFIG, 2, 4, sharded=False))
        == plan.num_elements
    )
