"""Factors on outputs and logits, muP, and norms of outputs and embeddings equal one rank
under every layout.
"""

from functools import cache
from typing import Any

import pytest
import torch

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.training.session import build
from tests.parallel.test_parity import compare
from tests.support import parity
from tests.support.parity import GPT2, LLAMA, RankResult, make_config
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel

MUP: dict[str, Any] = {
    "residual_scale": 0.9,
    "logit_scale": 1.2,
    "mup": {"base_hidden_size": 32, "base_num_layers": 1, "depth_alpha": 0.75},
}
PERI_NORM: dict[str, Any] = {
    "peri_norm": True,
    "embedding_norm": True,
    "embedding_scale": 1.5,
    "attention_scale": 0.2,
}
MODELS = {"mup": LLAMA | MUP, "peri-norm": LLAMA | PERI_NORM}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "cp2-dp2-zero3": {"cp": 2, "dp": 2, "zero": 3},
}


@cache
def one_rank(model: str, steps: int) -> RankResult:
    config = make_config(MODELS[model], {"dp": 1}, steps=steps)
    result: RankResult = run_ranks(parity.run_layout, 1, config)[0]
    return result


@pytest.mark.parametrize(
    "layout",
    [
        "tp2-sp",
        pytest.param("pp2", marks=pytest.mark.parity),
        pytest.param("cp2-dp2-zero3", marks=pytest.mark.parity),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_layout_equals_one_rank(model: str, layout: str, steps: int) -> None:
    compare(MODELS[model], LAYOUTS[layout], one_rank(model, steps))


@pytest.mark.parity
@pytest.mark.parametrize("model", MODELS)
def test_compiled_blocks_equal_one_plain_rank(model: str, steps: int) -> None:
    compare(MODELS[model], LAYOUTS["tp2-sp"], one_rank(model, steps), compiled=True)


def weights(config: TrainConfig) -> tuple[Any, dict[str, torch.Tensor]]:
    model, _ = build(config, ParallelMesh.single())
    return model.module, dict(model.module.named_parameters())


@pytest.mark.parametrize("fields", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_factors_are_those_of_the_last_weights_of_each_half(fields: dict[str, Any]) -> None:
    scaled, own = weights(make_config(fields | MUP, {"dp": 1}, steps=1))
    plain, others = weights(make_config(fields, {"dp": 1}, steps=1))
    model = ModelConfig.model_validate(fields | MUP)
    for name, other in others.items():
        factor = 1.0
        if ".attention.o." in name or ".mlp.down." in name:
            factor = model.residual_factor
        elif name.startswith("final_norm."):
            factor = model.logit_factor
        other.data.copy_(own[name] * factor)
    tokens = torch.arange(24).reshape(2, 12) * 5 % 256
    positions = torch.arange(12)[None]
    with torch.no_grad():
        logits = scaled.logits(tokens, positions)
        expected = plain.logits(tokens, positions)
    assert logits.abs().max() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)
