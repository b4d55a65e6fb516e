"""Replica groups that synchronize every few steps are what one process makes of the same
samples by plain arithmetic, in every layout; synchronized in each step, they are plain data
parallelism.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ray.checkpoint.directory import commit, list_checkpoints
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from tests.parallel.test_checkpoint_training import config as session_config
from tests.parallel.test_checkpoint_training import train as train_session
from tests.support.layout_matrix import EXPERTS
from tests.support.parity import (
    GPT2,
    LLAMA,
    assemble,
    split_vanishing,
    worst_relative_l2,
)
from tests.support.ranks import run_ranks
from tests.support.replica_groups import (
    SGD,
    Trained,
    train_groups,
    train_rank,
    with_groups,
)

pytestmark = pytest.mark.parallel
MOE = LLAMA | {"moe": EXPERTS}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "dp2": (LLAMA, {"dp": 2, "bucket_elements": 8000}, 2),
    "dp4": (LLAMA, {"dp": 4, "overlap_param_gather": True}, 4),
    "tp2-dp2": (LLAMA, {"tp": 2, "dp": 2, "sequence_parallel": True, "zero": 0}, 4),
    "pp2-dp2": (GPT2, {"pp": 2, "dp": 2}, 4),
    "ep2-dp4": (MOE, {"dp": 4, "ep": 2}, 4),
    "cp2-dp2": (LLAMA, {"cp": 2, "dp": 2}, 4),
}


ADAM = {"name": "adamw", "lr": 3e-3, "eps": 1e-5, "weight_decay": 0.1}
MOMENTS = ("exp_avg", "exp_avg_sq")
METHODS: dict[str, dict[str, Any]] = {
    "local_sgd": {"sync_every": 3},
    "des_loc": {
        "sync_every": 3,
        "sync_moments_every": {"exp_avg": 4, "exp_avg_sq": 5},
    },
    "diloco": {"sync_every": 3, "outer_optimizer": {}},
    "plain_outer_momentum": {
        "sync_every": 2,
        "outer_optimizer": {"lr": 0.9, "momentum": 0.5, "nesterov": False},
    },
    "streaming": {
        "sync_every": 4,
        "sync_moments_every": {"exp_avg": 2},
        "outer_optimizer": {"momentum": 0.8},
        "fragments": 2,
    },
}
STEPS = 8


def run(config: TrainConfig, world: int) -> list[Trained]:
    """Every rank's results."""
    results: list[Trained] = run_ranks(train_rank, world, config, MOMENTS)
    return results


def weights(config: TrainConfig, ranks: list[Trained]) -> dict[str, np.ndarray]:
    """Whole weights; replicas of all groups must agree to the bit."""
    return assemble(config, [rank.state["model/"] for rank in ranks])


def whole(config: TrainConfig, ranks: list[Trained], prefix: str) -> dict[str, np.ndarray]:
    """The whole tensors of one group."""
    return assemble(config, [rank.state[prefix] for rank in ranks])


def gradually(name: str) -> Any:
    """The layouts that always run, and those of `make parity`."""
    marks = [] if name in ("dp2", "pp2-dp2") else [pytest.mark.parity]
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("layout", [gradually(name) for name in LAYOUTS])
def test_synchronized_in_each_step_sgd_is_plain_data_parallelism(layout: str) -> None:
    model, parallel, world = LAYOUTS[layout]
    plain_config = with_groups(model, parallel, STEPS, SGD)
    config = with_groups(model, parallel, STEPS, SGD, groups=2, sync_every=1)
    plain = run_ranks(train_rank, world, plain_config)
    groups = run_ranks(train_rank, world, config)
    for one, other in zip(plain, groups, strict=True):
        np.testing.assert_allclose(other.losses, one.losses, rtol=1e-6)
    # Key biases without rotary positions have gradients that are rounding only.
    reference = split_vanishing(config, weights(config, plain))[0]
    assert worst_relative_l2(weights(config, groups), reference)[0] < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_are_what_one_process_averages(method: str) -> None:
    """To the bit: the sum of two numbers does not depend on their order."""
    config = with_groups(LLAMA, {"dp": 2}, STEPS, ADAM, groups=2, **METHODS[method])
    losses, groups = train_groups(config)
    ranks = run(config, 2)
    for rank in ranks:
        np.testing.assert_allclose(rank.losses, losses, rtol=1e-6)
        group = groups[rank.group]
        for prefix, boxes in rank.state.items():
            tensors = group.tensors(prefix)
            assert {name for name, _, _ in boxes} == set(tensors)
            for name, _, values in boxes:
                np.testing.assert_array_equal(values, tensors[name].detach().numpy())


@pytest.mark.parametrize("layout", [gradually(name) for name in LAYOUTS if name != "dp2"])
@pytest.mark.parametrize("method", ["des_loc", "streaming"])
def test_every_layout_is_what_one_process_averages(method: str, layout: str) -> None:
    model, parallel, world = LAYOUTS[layout]
    config = with_groups(model, parallel, STEPS, ADAM, groups=2, **METHODS[method])
    losses, groups = train_groups(config)
    ranks = run(config, world)
    for rank in ranks:
        np.testing.assert_allclose(rank.losses, losses, rtol=2e-5)
    for index, group in enumerate(groups):
        own = [rank for rank in ranks if rank.group == index]
        for prefix in own[0].state:
            reference = {
                name: tensor.detach().numpy()
                for name, tensor in group.tensors(prefix).items()
            }
            # Key biases without rotary positions have gradients that are rounding only.
            reference = split_vanishing(config, reference)[0]
            distance, name = worst_relative_l2(whole(config, own, prefix), reference)
            assert distance < 2e-3, f"{prefix}{name} of group {index}"
