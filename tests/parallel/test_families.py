"""What families have beside a plain Llama equals one rank under every layout: norms of
heads, windows, stretched positions and the rest.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.parallel.test_parity import compare, distance_from, world
from tests.support import parity
from tests.support.parity import (
    LLAMA,
    RankResult,
    assemble,
    make_config,
    worst_relative_l2,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel

EVERYTHING: dict[str, Any] = LLAMA | {
    "num_attention_heads": 8,
    "head_dim": 12,
    "qk_norm": True,
    "qkv_bias": True,
    "attention_output_bias": True,
    "sliding_window": 11,
    "full_attention_every": 2,
    "rope_scaling": {
        "kind": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 12,
        "beta_fast": 4.0,
    },
    "activation": "geglu_tanh",
    "zero_centered_norm": True,
    "embedding_scale": 8.0,
    "tie_embeddings": True,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "cp2-p2p": {"cp": 2},
    "cp2-all-gather": {"cp": 2, "cp_method": "all_gather"},
    "cp2-a2a": {"cp": 2, "cp_method": "a2a"},
    "pp2-zb-v": {"pp": 2, "vpp": 2, "schedule": "zb-v", "layout": "E|t|t|L"},
    "cp4-hierarchical": {"cp": 4, "cp_method": "a2a+p2p", "hierarchical_cp_sizes": (2, 2)},
    "cp2-tp2-sp": {"cp": 2, "tp": 2, "sequence_parallel": True},
    "tp2-sp-dp2-zero3": {"tp": 2, "dp": 2, "sequence_parallel": True, "zero": 3},
    # Each of the two key heads is on two ranks, and their norm's gradient is on all
    # four.
    "tp4": {"tp": 4},
    "tp4-sp-dp2": {"tp": 4, "dp": 2, "sequence_parallel": True},
}
IN_CHECK = ("tp2", "cp2-p2p", "tp4")


@cache
def one_rank(steps: int) -> RankResult:
    result: RankResult = run_ranks(
        parity.run_layout, 1, make_config(EVERYTHING, {"dp": 1}, steps=steps)
    )[0]
    return result


@pytest.mark.parametrize(
    "layout",
    [
        name if name in IN_CHECK else pytest.param(name, marks=pytest.mark.parity)
        for name in LAYOUTS
    ],
)
def test_layout_equals_one_rank(layout: str, steps: int) -> None:
    compare(EVERYTHING, LAYOUTS[layout], one_rank(steps))


def test_layer_norms_of_heads_have_biases_whose_gradients_are_summed_too(
    steps: int,
) -> None:
    model = EVERYTHING | {
        "norm": "layernorm",
        "zero_centered_norm": False,
        "sliding_window": None,
        "full_attention_every": None,
    }
    one = run_ranks(parity.run_layout, 1, make_config(model, {"dp": 1}, steps=steps))[0]
    assert "layers.0.attention.k_norm.bias" in {name for name, _, _ in one.gradients}
    compare(model, LAYOUTS["tp2"], one)


@pytest.mark.parametrize(
    "layouts", ["check", pytest.param("rest", marks=pytest.mark.parity)]
)
def test_bf16_layouts_stay_as_close_to_float64_as_one_bf16_rank(layouts: str) -> None:
    one = make_config(EVERYTHING, {"dp": 1}, steps=2, precision="bf16")
    truth = run_ranks(parity.float64_gradients, 1, one)[0]

    def distance(parallel: dict[str, Any]) -> float:
        config = make_config(EVERYTHING, {"dp": 1} | parallel, steps=2, precision="bf16")
        results = run_ranks(parity.run_layout, world(parallel), config, 1)
        return distance_from(
            truth, assemble(config, [result.gradients for result in results])
        )

    allowed = 1.3 * distance({})
    assert allowed < 0.1
    for name, parallel in LAYOUTS.items():
        if (name in ("tp2", "cp2-p2p")) == (layouts == "check"):
            assert distance(parallel) <= allowed, name


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["tp2-sp", "cp2-p2p"])
def test_compiled_blocks_equal_one_plain_rank(layout: str, steps: int) -> None:
    compare(EVERYTHING, LAYOUTS[layout], one_rank(steps), compiled=True)


@pytest.mark.parametrize(
    "layout", ["cp2-p2p", pytest.param("cp2-all-gather", marks=pytest.mark.parity)]
)
def test_packed_documents_with_a_window_equal_one_rank(layout: str) -> None:
    def run(parallel: dict[str, Any]) -> list[RankResult]:
        config = make_config(
            EVERYTHING, {"dp": 1} | parallel, steps=5, separate_documents=True
        )
        return run_ranks(parity.run_layout, parallel.get("cp", 1), config)

    (one,) = run({})
    cut = run(LAYOUTS[layout])
    config = make_config(EVERYTHING, {"dp": 1}, steps=5)
    distance = worst_relative_l2(
        assemble(config, [rank.gradients for rank in cut]),
        assemble(config, [one.gradients]),
    )
    assert distance[0] <= 5e-6, distance
    for rank in cut:
        np.testing.assert_allclose(rank.losses, one.losses, rtol=1e-5)
