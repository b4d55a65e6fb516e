"""Initial weights do not depend on who draws them."""

import math

import pytest
import torch

from megatron_ray.config.model import ModelConfig
from megatron_ray.models import initialization
from megatron_ray.models.initialization import draw_box, init_local
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.parameter_types import Init, LogicalParameter
from megatron_ray.sharding.parameters import local_parameters


def normal(shape: tuple[int, ...]) -> LogicalParameter:
    return LogicalParameter(
        "layers.0.mlp.up.weight", shape, Init("normal", 0.02), 0, decay=True
    )


def test_any_box_is_a_slice_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(initialization, "BLOCK_ELEMENTS", 7 * 24)
    whole = draw_box(normal((50, 24)), Box((0, 0), (50, 24)), seed=3)
    for offset, size in [
        ((0, 0), (7, 24)),
        ((5, 0), (20, 24)),
        ((13, 6), (31, 6)),
        ((49, 23), (1, 1)),
    ]:
        expected = whole[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]
        assert torch.equal(draw_box(normal((50, 24)), Box(offset, size), seed=3), expected)


def test_seed_and_name_matter_and_the_spread_is_right() -> None:
    box = Box((0, 0), (400, 100))
    first = draw_box(normal((400, 100)), box, seed=1)
    assert not torch.equal(first, draw_box(normal((400, 100)), box, seed=2))
    assert abs(float(first.std()) / 0.02 - 1) < 0.02
    assert abs(float(first.mean())) < 0.02 / math.sqrt(40000) * 4


def test_padding_rows_are_zero() -> None:
    model = ModelConfig.model_validate({"preset": "gpt-tiny", "vocab_size": 130})
    embedding = local_parameters(model, ParallelDims(tp=2), 1)[0]
    value = init_local(embedding, seed=1)
    assert value.shape == (128, 128)
    assert bool(value[2:].eq(0).all())
    assert not bool(value[:2].eq(0).any())


def test_rows_that_write_to_the_residual_start_smaller() -> None:
    model = ModelConfig.model_validate({"preset": "gpt-tiny", "vocab_size": 256})
    table = {
        parameter.name: parameter
        for parameter in local_parameters(model, ParallelDims(), 0)
    }
    spread = {
        name: float(init_local(table[name], 1).std())
        for name in ("layers.0.mlp.gate_up.weight", "layers.0.mlp.down.weight")
    }
    assert abs(spread["layers.0.mlp.gate_up.weight"] / 0.02 - 1) < 0.05
    assert abs(spread["layers.0.mlp.down.weight"] / (0.02 / math.sqrt(8)) - 1) < 0.05
