"""Replica groups that synchronize every few steps are what one process makes of the same
samples by plain arithmetic, in every layout; synchronized in each step, they are plain data
parallelism.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ray.checkpoint.directory import commit, list_checkpoints
from megatron_ray.checkpoint.load import SavedCheckpoint
from megatron_ray.config.problem import ConfigError
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared import PreparedData
from megatron_ray.sharding.sharded_state import whole_tensor
from megatron_ray.validation.storage.disk_space import checkpoint_bytes
from tests.parallel.test_checkpoint_training import config as session_config
from tests.parallel.test_checkpoint_training import goes_on_here_and_elsewhere
from tests.parallel.test_checkpoint_training import train as train_session
from tests.parallel.test_skipped_steps import BAD, run_with_bad_steps, same, skipping
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


@pytest.mark.parametrize(
    ("method", "precision"),
    [*((name, "fp32") for name in METHODS), ("streaming", "bf16")],
)
def test_two_ranks_are_what_one_process_averages(method: str, precision: str) -> None:
    """To the bit: the sum of two numbers does not depend on their order."""
    config = with_groups(
        LLAMA, {"dp": 2}, STEPS, ADAM, precision, groups=2, **METHODS[method]
    )
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


def test_a_bad_step_of_one_group_is_skipped_by_all() -> None:
    """So that all groups count the same updates."""
    config = skipping({"dp": 2, "local_sgd": {"groups": 2, "sync_every": 4}})
    for result in run_ranks(run_with_bad_steps, 2, config):
        before, after, later = result["states"][BAD - 1 : BAD + 2]
        assert same(before, after)
        assert not same(after, later)
        assert [report.step for report in result["skipped"]] == [BAD]
        assert result["saved"][-1].num_updates == 4


def in_groups(folder: Path, tp: int = 1, **local_sgd: Any) -> TrainConfig:
    fields = session_config(folder, tp, 2).model_dump(exclude_unset=True)
    fields["parallel"]["local_sgd"] = {"groups": 2, "sync_every": 3} | local_sgd
    return TrainConfig.from_mapping(fields)


STREAMING: dict[str, Any] = {
    "sync_moments_every": {"exp_avg": 5, "exp_avg_sq": 7},
    "outer_optimizer": {},
    "fragments": 2,
}


@pytest.fixture
def corpus(tmp_path: Path) -> PreparedData:
    text = "\n".join(
        f"line {number}: {number * number} is a square" for number in range(400)
    )
    (tmp_path / "corpus.txt").write_text(text)
    settings = session_config(tmp_path, 1, 1)
    return prepare(settings.data, str(tmp_path / "cache"), seq_length=32)


def test_a_run_goes_on_from_between_two_synchronizations(
    tmp_path: Path, corpus: PreparedData
) -> None:
    """Bit for bit as it was, and in another layout of its groups."""
    here = in_groups(tmp_path, **STREAMING)
    there = in_groups(tmp_path, tp=2, **STREAMING)
    _, half = goes_on_here_and_elsewhere(run_ranks, here, there, corpus, rel=2e-5)
    saved = SavedCheckpoint(half).tensors
    weights = {name for name in saved if name.startswith("model/")}
    assert {f"groups/1/{name}" for name in weights} <= saved.keys()
    assert {
        name.replace("model/", "local_sgd/momentum/") for name in weights
    } <= saved.keys()
    total = sum(math.prod(tensor.shape) * 4 for tensor in saved.values())
    assert total == checkpoint_bytes(here)


def test_a_plain_run_goes_on_with_groups_and_groups_with_more_of_them(
    tmp_path: Path, corpus: PreparedData
) -> None:
    """New groups continue from the first one; the change must be allowed."""
    plain = session_config(tmp_path, 1, 2)
    run_ranks(train_session, 2, plain, corpus, 1, None)
    half = list_checkpoints(str(tmp_path / "tp1"))[0].path
    commit(half, {}, [])
    changed = in_groups(tmp_path, **STREAMING)
    with pytest.raises(ConfigError, match="replica groups would synchronize otherwise"):
        run_ranks(train_session, 2, changed, corpus, 2, half)
    fields = changed.model_dump(exclude_unset=True)
    fields["checkpoint"]["resume_changes"] = ("data.train", "parallel.local_sgd")
    allowed = TrainConfig.from_mapping(fields)
    steps = run_ranks(train_session, 2, allowed, corpus, 3, half)[0]
    assert sorted(steps) == [0, 5, 6, 7, 8]
    (newest,) = [
        info.path
        for info in list_checkpoints(str(tmp_path / "tp1"))
        if info.path.endswith("step-00000008-a0003")
    ]
    commit(newest, {}, [])
    assert any(name.startswith("groups/1/") for name in SavedCheckpoint(newest).tensors)


def test_weights_are_equal_after_the_last_step(
    tmp_path: Path, corpus: PreparedData
) -> None:
    settings = in_groups(tmp_path)
    run_ranks(train_session, 2, settings, corpus, 1, None)
    last = list_checkpoints(str(tmp_path / "tp1"))[-1].path
    commit(last, {}, [])
    saved = SavedCheckpoint(last)
    names = [name for name in saved.tensors if name.startswith("model/")]
    for name in names:
        shape = saved.tensors[name].shape
        one, other = torch.empty(shape), torch.ones(shape)
        saved.load_into({name: whole_tensor(one), f"groups/1/{name}": whole_tensor(other)})
        assert torch.equal(one, other), name


def test_rare_synchronization_costs_less_than_two_percent_of_the_loss() -> None:
    steps = 300
    plain = with_groups(LLAMA, {"dp": 2}, steps, ADAM)
    groups = with_groups(
        LLAMA,
        {"dp": 2},
        steps,
        ADAM,
        groups=2,
        sync_every=32,
        sync_moments_every={"exp_avg": 64, "exp_avg_sq": 128},
    )
    losses = []
    for config in (plain, groups):
        rank = run_ranks(train_rank, 2, config, timeout_s=300)[0]
        assert rank.losses[-1] < rank.losses[0] - 0.2, "something is learned"
        losses.append(float(np.mean(rank.losses[-10:])))
    assert losses[1] < 1.02 * losses[0]
