"""Dropout on real ranks: replicas stay equal, parts are drawn apart, and what the
layout does not cut is what one rank drops.
"""

from functools import cache
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ray.commands import Command
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.models.dropout import Dropout
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.loop import train
from megatron_ray.training.progress import Progress
from megatron_ray.training.session import batch_maker, build
from tests.parallel.test_parity import compare as compare_with_one_rank
from tests.support import parity
from tests.support.parity import (
    GPT2,
    LLAMA,
    NoSaver,
    RandomDataset,
    RankResult,
    make_config,
    make_mesh,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel

RATE = 0.2
BOTH = {"hidden_dropout": RATE, "attention_dropout": RATE}
Masks = dict[str, Tensor]
Weights = dict[tuple[str, tuple[int, ...]], Tensor]


def train_and_watch(
    rank: int, world_size: int, configs: list[TrainConfig]
) -> list[tuple[Masks, Weights]]:
    """By config: the first mask of each place, and after the last step the weights by
    logical name and offset.
    """
    return [_train_and_watch(rank, world_size, config) for config in configs]


def _train_and_watch(
    rank: int, world_size: int, config: TrainConfig
) -> tuple[Masks, Weights]:
    mesh = make_mesh(rank, world_size, config)
    training = config.training
    model, optimizer = build(config, mesh)
    masks: Masks = {}
    for name, module in model.module.named_modules():
        if isinstance(module, Dropout):
            _watch(name, module, masks)
    dataset = RandomDataset(config.model.vocabulary, training.seq_length)
    make_batch = batch_maker(config, mesh)
    loader = StepLoader(
        dataset,
        training.micro_batch_size,
        training.global_batch_size,
        mesh.dp_rank,
        mesh.dims.dp,
        make_batch,
    )
    train(
        TrainingComponents(config, mesh, model, optimizer, loader, None, NoSaver()),
        Progress(),
        lambda _: None,
        lambda: Command.CONTINUE,
    )
    values = dict(model.module.named_parameters())
    weights = {
        (part.logical.name, part.box.offset): values[local.name]
        .detach()
        .narrow(0, part.start, part.box.size[0])
        .clone()
        for local in model.parameters
        for part in local.parts
    }
    return masks, weights


def _watch(name: str, module: Dropout, masks: Masks) -> None:
    plain = module.mask

    def mask(like: Tensor, first_sample: int) -> Tensor:
        drawn = plain(like, first_sample)
        masks.setdefault(name, drawn)
        return drawn

    module.mask = mask  # type: ignore[method-assign]


def correlation(left: Tensor, right: Tensor) -> float:
    """In standard deviations of independent masks."""
    return float(
        torch.corrcoef(torch.stack([left.flatten(), right.flatten()]).double())[0, 1]
    ) * sqrt(left.numel())


def check(parallel: dict[str, Any], ranks: list[tuple[Masks, Weights]]) -> None:
    (left, left_weights), (right, right_weights) = ranks
    for masks in (left, right):
        for drawn in masks.values():
            assert abs(float(drawn.double().mean()) - RATE) < 4 * sqrt(
                RATE * (1 - RATE) / drawn.numel()
            )
    if "pp" in parallel:
        assert not left.keys() & right.keys(), "stages have places of their own"
    else:
        assert left.keys() == right.keys()
        assert len(left) == 7
    for place in left.keys() & right.keys():
        shared = (
            "tp" in parallel
            and not parallel.get("sequence_parallel")
            and "core_with_dropout" not in place
        )
        if shared:
            assert torch.equal(left[place], right[place]), place
        else:
            assert abs(correlation(left[place], right[place])) < 4, place
    names = list(left)
    same_shape = [
        (one, other)
        for one in names
        for other in names
        if one < other and left[one].shape == left[other].shape
    ]
    assert same_shape
    assert all(abs(correlation(left[one], left[other])) < 4 for one, other in same_shape)
    replicas = left_weights.keys() & right_weights.keys()
    assert (
        {name for name, _ in replicas} >= {"embedding.weight"}
        if "tp" not in parallel
        else {"layers.0.attention_norm.weight"}
    )
    assert all(torch.equal(left_weights[where], right_weights[where]) for where in replicas)


LAYOUTS: list[dict[str, Any]] = [
    {"tp": 2},
    {"tp": 2, "sequence_parallel": True},
    {"dp": 2},
    {"pp": 2},
]


def test_replicas_stay_equal_and_parts_are_drawn_apart() -> None:
    configs = [
        make_config(GPT2 | BOTH, {"dp": 1} | parallel, steps=10) for parallel in LAYOUTS
    ]
    ranks = run_ranks(train_and_watch, 2, configs, timeout_s=180)
    for index, parallel in enumerate(LAYOUTS):
        check(parallel, [rank[index] for rank in ranks])


@pytest.mark.parity
def test_ranks_that_share_a_sequence_draw_apart() -> None:
    (config,) = [make_config(GPT2 | {"hidden_dropout": RATE}, {"dp": 1, "cp": 2}, steps=10)]
    (left, left_weights), (right, right_weights) = (
        rank[0] for rank in run_ranks(train_and_watch, 2, [config], timeout_s=180)
    )
    assert len(left) == 5
    assert all(abs(correlation(left[place], right[place])) < 4 for place in left)
    assert all(
        torch.equal(weight, right_weights[where]) for where, weight in left_weights.items()
    )


SHAPES = {"llama": LLAMA | BOTH, "gpt2-hidden": GPT2 | {"hidden_dropout": RATE}}


@cache
def one_rank(shape: str, steps: int) -> RankResult:
    config = make_config(SHAPES[shape], {"dp": 1}, steps=steps)
    results: list[RankResult] = run_ranks(parity.run_layout, 1, config)
    return results[0]


def test_replicas_and_stages_drop_what_one_rank_drops(steps: int) -> None:
    compare_with_one_rank(SHAPES["llama"], {"dp": 2, "pp": 2}, one_rank("llama", steps))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("shape", "layout"),
    [("gpt2-hidden", {"tp": 2}), ("gpt2-hidden", {"tp": 2, "pp": 2, "schedule": "zb-h1"})],
)
def test_tensor_parallel_ranks_drop_the_hidden_states_that_one_rank_drops(
    shape: str, layout: dict[str, Any], steps: int
) -> None:
    compare_with_one_rank(SHAPES[shape], layout, one_rank(shape, steps))
