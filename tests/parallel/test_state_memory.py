"""Main parameters as remainders and state in host memory change no bit of a run, in any
layout and over a resume that switches them on and off.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from megatron_ray.checkpoint.directory import commit, list_checkpoints
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared import PreparedData
from megatron_ray.optimizer import shard
from megatron_ray.optimizer.state_memory import main_parameters
from megatron_ray.optimizer.state_memory.main_parameters import MainShard, split
from tests.parallel.test_checkpoint_training import config as resumed_config
from tests.parallel.test_checkpoint_training import train
from tests.support.parity import LLAMA, RankResult, assemble, make_config, run_layout
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
REMAINDERS = {"store_param_remainders": True}
OFFLOAD = {"offload": True}


def away_from_zero(self: MainShard, weights: Tensor, values: Tensor) -> None:
    """How remainders need weights rounded; without them, ties go to even weights."""
    weights.copy_(split(values)[0])


def rounded_alike(
    rank: int, world_size: int, function: Callable[..., Any], *args: Any
) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MainShard, "round_to", away_from_zero)
        return function(rank, world_size, *args)


def settings(
    name: str, precision: str, parallel: dict[str, Any], **numbers: Any
) -> TrainConfig:
    layout = {"dp": 1, "bucket_elements": 8000} | parallel
    fields = make_config(LLAMA, layout, steps=6, precision=precision).model_dump()
    if precision == "fp16":
        fields["training"]["loss_scale"] = {"initial_scale": 1024}
    fields["optimizer"] = {"name": name, "lr": 3e-3, "weight_decay": 0.1, **numbers}
    return TrainConfig.from_mapping(fields)


def outcome(
    world_size: int, config: TrainConfig, *, alike: bool = False
) -> tuple[list[RankResult], dict[str, np.ndarray]]:
    if alike:
        results = run_ranks(rounded_alike, world_size, run_layout, config)
    else:
        results = run_ranks(run_layout, world_size, config)
    return results, assemble(config, [result.weights for result in results])


@cache
def plain(
    name: str, precision: str, parallel: tuple[tuple[str, Any], ...], *, alike: bool
) -> tuple[list[RankResult], dict[str, np.ndarray]]:
    layout = dict(parallel)
    world_size = 2 if layout else 1
    return outcome(world_size, settings(name, precision, layout), alike=alike)


def assert_same(
    name: str, precision: str, parallel: dict[str, Any], numbers: dict[str, Any]
) -> list[RankResult]:
    alike = "store_param_remainders" in numbers
    before, weights = plain(name, precision, tuple(parallel.items()), alike=alike)
    results, others = outcome(len(before), settings(name, precision, parallel, **numbers))
    for one, other in zip(before, results, strict=True):
        assert one.losses == other.losses
        assert one.grad_norms == other.grad_norms
    for key, values in weights.items():
        assert np.array_equal(values, others[key]), key
    return results


LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "zero1": {"dp": 2},
    "zero0": {"dp": 2, "zero": 0},
    "tp": {"tp": 2, "sequence_parallel": True},
    "pp": {"pp": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_remainders_change_no_bit_in_any_layout(layout: str) -> None:
    assert_same("adamw", "bf16", LAYOUTS[layout], REMAINDERS)


@pytest.mark.parametrize("name", ["decoupled_adamw", "adopt", "muon", "sgd"])
def test_remainders_change_no_bit_of_other_optimizers(name: str) -> None:
    assert_same(name, "bf16", LAYOUTS["zero1"], REMAINDERS)


@pytest.mark.parametrize(
    ("layout", "precision"),
    [("zero1", "fp32"), ("zero1", "bf16"), ("tp", "bf16"), ("pp", "fp16")],
)
def test_offloading_changes_no_bit(layout: str, precision: str) -> None:
    assert_same("adamw", precision, LAYOUTS[layout], OFFLOAD)


@pytest.mark.parametrize("name", ["adopt", "muon", "sgd"])
def test_offloading_changes_no_bit_of_other_optimizers(name: str) -> None:
    assert_same(name, "bf16", LAYOUTS["zero1"], OFFLOAD)


def test_offloading_changes_no_bit_of_sharded_weights() -> None:
    assert_same("adamw", "bf16", {"dp": 2, "zero": 3}, OFFLOAD)


def test_remainders_are_offloaded_too() -> None:
    short = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
    before, weights = outcome(2, settings("adamw", "bf16", {"dp": 2}, **short), alike=True)
    numbers = REMAINDERS | OFFLOAD | short
    results, others = outcome(2, settings("adamw", "bf16", {"dp": 2}, **numbers))
    assert results[0].losses == before[0].losses
    for key, values in weights.items():
        assert np.array_equal(values, others[key]), key


@pytest.mark.parametrize("name", ["adamw", "adopt", "muon"])
def test_parts_of_a_run_change_no_bit(name: str) -> None:
    config = settings(name, "bf16", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MainShard, "round_to", away_from_zero)
        (before, weights) = one_rank(config)
    optimizer = config.optimizer.model_copy(update=REMAINDERS | OFFLOAD)
    with pytest.MonkeyPatch.context() as patch:
        for module in (shard, main_parameters):
            patch.setattr(module, "CHUNK", 1000)
        (after, others) = one_rank(config.model_copy(update={"optimizer": optimizer}))
    assert before.losses == after.losses
    for key, values in weights.items():
        assert np.array_equal(values, others[key]), key


def one_rank(config: TrainConfig) -> tuple[RankResult, dict[str, np.ndarray]]:
    result = run_layout(0, 1, config)
    return result, assemble(config, [result.weights])


@pytest.fixture
def corpus(tmp_path: Path) -> PreparedData:
    text = "\n".join(f"line {number}: {number % 7} is left" for number in range(400))
    (tmp_path / "corpus.txt").write_text(text)
    data = resumed_config(tmp_path, 1, 1).data
    return prepare(data, str(tmp_path / "cache"), seq_length=32)


def in_bf16(folder: Path, degrees: tuple[int, int], **numbers: Any) -> TrainConfig:
    fields = resumed_config(folder, *degrees).model_dump()
    fields["training"]["precision"] = "bf16"
    fields["optimizer"] |= numbers
    return TrainConfig.from_mapping(fields)


@pytest.mark.parametrize("numbers", [REMAINDERS, OFFLOAD, REMAINDERS | OFFLOAD])
def test_a_resume_switches_them_on_and_off(
    tmp_path: Path, corpus: PreparedData, numbers: dict[str, bool]
) -> None:
    """Of checkpoints of either form, in either form, and in another layout."""
    without = in_bf16(tmp_path / "without", (1, 2))
    with_them = in_bf16(tmp_path / "with", (1, 2), **numbers)

    def losses(settings: TrainConfig, attempt: int, resume_from: str | None = None) -> Any:
        arguments = (train, settings, corpus, attempt, resume_from)
        if "store_param_remainders" in numbers:
            return run_ranks(rounded_alike, 2, *arguments)[0]
        return run_ranks(train, 2, *arguments[1:])[0]

    whole = losses(without, 1)
    assert losses(with_them, 1) == whole
    rest = {step: whole[step] for step in (0, *range(5, 9))}
    for saved, resumed in ((without, with_them), (with_them, without)):
        assert saved.storage is not None
        half = list_checkpoints(saved.storage.path)[0].path
        commit(half, {}, [])
        assert losses(resumed, 2, half) == rest, "bit for bit"
    assert losses(with_them, 3, half) == rest
    elsewhere = in_bf16(tmp_path / "with", (2, 1), **numbers)
    for step, values in losses(elsewhere, 4, half).items():
        assert values == pytest.approx(whole[step], rel=2e-2)
