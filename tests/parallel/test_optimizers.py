"""Every optimizer on several ranks: ZeRO-1 changes no bit, tensor parallelism only the
order of sums.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest

from megatron_ray.config.optimizer_kinds import BUILT_IN
from megatron_ray.config.train_config import TrainConfig
from tests.support.parity import LLAMA, RankResult, assemble, make_config, run_layout
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
LR = {"sgd": 0.1}
TWO_MOMENTS = ({"beta": 0.5, "weight": 0.3}, {"beta": 0.99, "weight": 0.6})


SHORT = "-bf16"
"""End of the names of cases whose moments are bf16."""


def settings(name: str, **parallel: Any) -> TrainConfig:
    case = name
    name = name.removesuffix(SHORT)
    config = make_config(LLAMA, {"dp": 1, "bucket_elements": 8000} | parallel, steps=6)
    optimizer: dict[str, Any] = {
        "name": name,
        "lr": LR.get(name, 3e-3),
        "weight_decay": 0.01,
    }
    if "eps" in BUILT_IN[name].numbers:
        # Where a gradient is nearly 0, its sign depends on the order of sums.
        optimizer["eps"] = 1e-4
    if name.startswith("aggmo"):
        optimizer["aggregated"] = TWO_MOMENTS
    if case.endswith(SHORT):
        optimizer |= {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
    return TrainConfig.from_mapping({**config.model_dump(), "optimizer": optimizer})


@cache
def run(name: str, world_size: int, **parallel: Any) -> list[RankResult]:
    results: list[RankResult] = run_ranks(
        run_layout, world_size, settings(name, **parallel)
    )
    return results


def weights(name: str, world_size: int, **parallel: Any) -> dict[str, np.ndarray]:
    parts = [result.weights for result in run(name, world_size, **parallel)]
    return assemble(settings(name, **parallel), parts)


@pytest.mark.parametrize("name", [*BUILT_IN, f"adamw{SHORT}", f"muon{SHORT}"])
def test_zero1_changes_no_bit(name: str) -> None:
    whole = weights(name, 2, dp=2, zero=0)
    sharded = weights(name, 2, dp=2, zero=1)
    for key, values in whole.items():
        assert np.array_equal(values, sharded[key]), key
    state_bytes = [run(name, 2, dp=2, zero=zero)[0].state_bytes for zero in (0, 1)]
    optimizer = settings(name).optimizer
    if BUILT_IN[optimizer.name].state(optimizer):
        assert state_bytes[1] < 0.6 * state_bytes[0]


@pytest.mark.parametrize("name", BUILT_IN)
def test_tensor_parallel_ranks_update_as_one(name: str) -> None:
    (one,) = run(name, 1)
    for result in run(name, 2, tp=2, sequence_parallel=True):
        np.testing.assert_allclose(result.losses, one.losses, rtol=1e-5)
    moved = weights(name, 2, tp=2, sequence_parallel=True)
    for key, values in weights(name, 1).items():
        assert np.abs(values - moved[key]).max() <= 2e-5, key
