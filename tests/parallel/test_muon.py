"""Muon in every direction that a matrix can be cut in: the ranks update it as one does.

Tensor-parallel ranks and ZeRO-1 of a plain model are in test_optimizers.py.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest

from megatron_ray.config.train_config import TrainConfig
from tests.support.layout_matrix import EXPERTS
from tests.support.parity import (
    LLAMA,
    RankResult,
    assemble,
    make_config,
    record_choices,
    run_layout,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
LATENT: dict[str, Any] = {
    name: value for name, value in LLAMA.items() if name != "num_query_groups"
} | {
    "mtp": {"num_layers": 1},
    "mla": {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    },
}
MODELS = {"llama": LLAMA, "experts": LLAMA | {"moe": EXPERTS}, "latent": LATENT}
JOINED = {"split_qkv": False, "split_gate_up": False}
CASES: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "more ranks than key/value heads": ("llama", JOINED, 4, {"tp": 4}),
    "stages": ("llama", JOINED, 4, {"pp": 2, "cp": 2}),
    "rows": ("llama", JOINED, 2, {"dp": 2, "zero": 3}),
    "experts": ("experts", JOINED, 4, {"tp": 2, "dp": 2, "etp": 2}),
    "experts apart": ("experts", JOINED, 2, {"dp": 2, "ep": 2}),
    "latent attention": (
        "latent",
        {},
        4,
        {"tp": 2, "dp": 2, "sequence_parallel": True},
    ),
}


def settings(
    model: str, muon: dict[str, Any], parallel: dict[str, Any], precision: str = "fp32"
) -> TrainConfig:
    """Buckets of a few matrices, so that the borders of shares go through matrices."""
    layout = {"dp": 1, "bucket_elements": 20_000} | parallel
    config = make_config(MODELS[model], layout, steps=6, precision=precision)
    optimizer = {"name": "muon", "lr": 3e-3, "eps": 1e-4, "weight_decay": 0.01}
    return TrainConfig.from_mapping(
        {**config.model_dump(), "optimizer": optimizer | {"muon": muon}}
    )


@cache
def one_rank(model: str, joined: bool) -> RankResult:
    muon = JOINED if joined else {}
    (one,) = run_ranks(run_layout, 1, settings(model, muon, {}))
    assert isinstance(one, RankResult)
    return one


def weights(config: TrainConfig, results: list[RankResult]) -> dict[str, np.ndarray]:
    return assemble(config, [result.weights for result in results])


@pytest.mark.parametrize("case", CASES)
def test_a_matrix_is_updated_as_on_one_rank(case: str) -> None:
    model, muon, world_size, parallel = CASES[case]
    one = one_rank(model, muon == JOINED)
    config = settings(model, muon, parallel)
    choices = None
    if "moe" in MODELS[model]:
        choices = record_choices(settings(model, muon, {}), one)
    results = run_ranks(run_layout, world_size, config, 5, choices)
    for result in results:
        np.testing.assert_allclose(result.losses, one.losses, rtol=1e-5)
    expected = weights(settings(model, muon, {}), [one])
    for key, values in weights(config, results).items():
        assert np.abs(values - expected[key]).max() <= 2e-5, key


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero1_changes_no_bit_of_experts(precision: str) -> None:
    layout = {"tp": 2, "dp": 2, "etp": 1, "ep": 2}
    muon = {"precision": precision}
    flat, sharded = (
        settings("experts", muon, layout | {"zero": zero}, precision) for zero in (0, 1)
    )
    whole = weights(flat, run_ranks(run_layout, 4, flat))
    for key, values in weights(sharded, run_ranks(run_layout, 4, sharded)).items():
        assert np.array_equal(values, whole[key]), key
