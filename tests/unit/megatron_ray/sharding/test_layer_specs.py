"""Modules have the shapes of the parameter table, on every rank of every cut."""

from functools import partial
from typing import Any

import pytest
import torch

from megatron_ray.config.model import ModelConfig
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.distributed.interleaver import Interleaver
from megatron_ray.distributed.rng import Streams
from megatron_ray.models.attention import LocalAttention
from megatron_ray.models.gpt import GPT
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.parallelize.parallel_layers import (
    ExpertParallelGroups,
    ParallelLayerFactory,
)
from megatron_ray.sharding.layer_specs import ShardPosition
from megatron_ray.sharding.parameters import local_parameters
from megatron_ray.tensor_parallel.group import TensorParallel
from tests.unit.megatron_ray.sharding.test_parameters import MIXTURE, SHAPES

MODELS: dict[str, dict[str, Any]] = {
    **SHAPES,
    "mixture": MIXTURE,
    "plain-mixture": MIXTURE | {"activation": "gelu"},
    "deepseek": {"preset": "deepseek-tiny", "vocab_size": 1000},
}


def make_module(model: ModelConfig, dims: ParallelDims, rank: int) -> GPT:
    position = ShardPosition.of_rank(dims, rank)
    device = DeviceKind("cpu", bf16_products=True)
    layers = ParallelLayerFactory(
        model,
        position,
        TensorParallel(None, position.tp, position.tp_rank),
        ExpertParallelGroups(Interleaver(torch.device("cpu"))),
        dtype=torch.float32,
        streams=Streams(0, {"tp": position.tp_rank, "cp": 0}),
        attention=partial(LocalAttention, device),
    )
    with torch.device("meta"):
        return GPT(model, layers)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "dims", [ParallelDims(), ParallelDims(tp=2, dp=2, ep=2), ParallelDims(tp=4)], ids=str
)
def test_modules_have_the_shapes_of_the_table(name: str, dims: ParallelDims) -> None:
    model = ModelConfig.model_validate(MODELS[name])
    for rank in range(dims.world_size):
        module = make_module(model, dims, rank)
        shapes = {key: tuple(value.shape) for key, value in module.named_parameters()}
        table = local_parameters(model, dims, rank)
        assert shapes == {local.name: local.shape for local in table}
