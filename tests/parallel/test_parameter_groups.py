"""Numbers by groups of parameters: every layout updates as one rank does, what a group
spares is spared, and what no group sets stays as it was.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest

from megatron_ray.config.train_config import TrainConfig
from tests.support.parity import (
    GPT2,
    LLAMA,
    RankResult,
    assemble,
    make_config,
    run_layout,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
MOE: dict[str, Any] = LLAMA | {
    "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48, "aux_loss_coeff": 0.02}
}
MODELS: dict[str, dict[str, Any]] = {"llama": LLAMA, "gpt2": GPT2, "moe": MOE}
GROUPS: tuple[dict[str, Any], ...] = (
    {"parameters": ["embedding.*"], "weight_decay": 0.0, "lr_scale": 0.1},
    # Parts of fused tensors, and one-dimensional parameters.
    {"parameters": ["*.attention.q.*", "*.mlp*.up.*"], "lr_scale": 2.0, "beta2": 0.5},
    {"parameters": ["*norm.*"], "weight_decay": 0.5, "beta1": 0.5, "eps": 1e-3},
    {"parameters": ["layers.1.*"], "lr_scale": 0.5},
)


def grouped(model: str, parallel: dict[str, Any], groups: Any = GROUPS) -> TrainConfig:
    config = make_config(
        MODELS[model], {"dp": 1, "bucket_elements": 8000} | parallel, steps=6
    )
    optimizer = {**config.optimizer.model_dump(), "groups": groups}
    return TrainConfig.from_mapping({**config.model_dump(), "optimizer": optimizer})


@cache
def reference(model: str, *, with_groups: bool = True) -> RankResult:
    config = grouped(model, {}, GROUPS if with_groups else ())
    results: list[RankResult] = run_ranks(run_layout, 1, config)
    return results[0]


@pytest.mark.parametrize(
    ("model", "parallel", "world"),
    [
        ("llama", {"tp": 2, "sequence_parallel": True}, 2),
        ("llama", {"dp": 2, "zero": 3}, 2),
        ("gpt2", {"pp": 2}, 2),
        ("moe", {"dp": 2, "ep": 2}, 2),
    ],
    ids=["llama-tp2-sp", "llama-dp2-zero3", "gpt2-pp2", "moe-dp2-ep2-zero1"],
)
def test_groups_update_as_on_one_rank(
    model: str, parallel: dict[str, Any], world: int
) -> None:
    one = reference(model)
    config = grouped(model, parallel)
    ranks: list[RankResult] = run_ranks(run_layout, world, config)
    for result in ranks:
        np.testing.assert_allclose(result.losses, one.losses, rtol=1e-5)
        np.testing.assert_allclose(result.grad_norms, one.grad_norms, rtol=1e-5)
    after = assemble(config, [result.weights for result in ranks])
    for name, values in assemble(config, [one.weights]).items():
        assert np.abs(values - after[name]).max() <= 1e-5, name


def test_a_group_changes_its_parameters() -> None:
    config = grouped("llama", {})
    plain, with_groups = (
        assemble(config, [reference("llama", with_groups=is_grouped).weights])
        for is_grouped in (False, True)
    )
    start = assemble(config, [reference("llama").initial])
    moved = {
        name: np.linalg.norm(with_groups[name] - start[name])
        / np.linalg.norm(plain[name] - start[name])
        for name in start
    }
    assert 0.05 < moved["embedding.weight"] < 0.2
    assert moved["layers.0.attention.q.weight"] > 1.5
    assert 0.9 < moved["layers.0.attention.k.weight"] < 1.1
    assert 0.4 < moved["layers.1.attention.k.weight"] < 0.6
