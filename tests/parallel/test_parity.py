"""Every layout equals one rank: initial weights, gradients, losses, norms, weights."""

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import numpy as np
import pytest

from tests.support import parity
from tests.support.parity import (
    GPT2,
    LLAMA,
    RankResult,
    assemble,
    make_config,
    split_vanishing,
    worst_relative_l2,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel

MODELS: dict[str, dict[str, Any]] = {"llama": LLAMA, "gpt2": GPT2}
SMALL_BUCKETS = {"bucket_elements": 8000}

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "dp2-zero1": {"dp": 2},
    "dp2-zero0": {"dp": 2, "zero": 0},
    "tp2-dp2-zero1": {"tp": 2, "dp": 2},
    "tp2-sp-dp2-zero1": {"tp": 2, "dp": 2, "sequence_parallel": True},
    "tp2-sp-dp2-zero0": {"tp": 2, "dp": 2, "sequence_parallel": True, "zero": 0},
    "tp2-dp2-zero0": {"tp": 2, "dp": 2, "zero": 0},
    "pp2": {"pp": 2},
    "pp2-gpipe-dp2-zero0": {"pp": 2, "dp": 2, "schedule": "gpipe", "zero": 0},
    "pp2-zb-dp2-zero1": {"pp": 2, "dp": 2, "schedule": "zb-h1"},
    "pp2-zb-v": {"pp": 2, "vpp": 2, "schedule": "zb-v", "layout": "E|t|t|L"},
    "pp2-tp2-sp": {"pp": 2, "tp": 2, "sequence_parallel": True},
    "pp2-tp2-uneven": {"pp": 2, "tp": 2, "first_stage_layers": 2, "last_stage_layers": 0},
}

CONTEXT_LAYOUTS: dict[str, dict[str, Any]] = {
    "cp2-p2p": {"cp": 2},
    "cp2-all-gather-zero0": {"cp": 2, "cp_method": "all_gather", "zero": 0},
    "cp2-a2a-dp2": {"cp": 2, "cp_method": "a2a", "dp": 2},
    "cp2-p2p-tp2-sp": {"cp": 2, "tp": 2, "sequence_parallel": True},
    "cp4-hierarchical": {"cp": 4, "cp_method": "a2a+p2p", "hierarchical_cp_sizes": (2, 2)},
}
FULL_SHARD: dict[str, dict[str, Any]] = {
    "dp2-zero3": {"dp": 2, "zero": 3},
    "dp2-tp2-sp-zero3": {"dp": 2, "tp": 2, "sequence_parallel": True, "zero": 3},
    "dp4-hsdp": {"dp": 4, "zero": 3, "zero_replicas": 2},
    "dp2-pp2-zero3": {"dp": 2, "pp": 2, "zero": 3},
    "dp2-cp2-zero3": {"dp": 2, "cp": 2, "zero": 3},
}
LAYOUTS |= {"dp2-pp2-zero3": FULL_SHARD["dp2-pp2-zero3"]}
# Of 8 query heads and 2 key/value heads: each of these is on two ranks.
SHARED_HEADS: dict[str, dict[str, Any]] = {
    "tp4": {"tp": 4},
    "tp4-sp-zero0": {"tp": 4, "sequence_parallel": True, "zero": 0},
    "tp4-sp-dp2": {"tp": 4, "sequence_parallel": True, "dp": 2},
    "tp4-cp2": {"tp": 4, "cp": 2},
}
LAYOUTS |= CONTEXT_LAYOUTS
IN_CHECK = {
    "tp2",
    "tp2-sp",
    "dp2-zero1",
    "dp2-zero0",
    "dp2-pp2-zero3",
    "tp2-sp-dp2-zero1",
    "pp2",
    "pp2-zb-dp2-zero1",
    "pp2-zb-v",
    "pp2-tp2-uneven",
    "cp2-p2p-tp2-sp",
}
"""The others belong to the long form, with the matrix."""
LONG_LAYOUTS: dict[str, dict[str, Any]] = FULL_SHARD | {
    "tp4-sp": {"tp": 4, "sequence_parallel": True},
    "dp4-zero1": {"dp": 4},
    "dp4-zero0": {"dp": 4, "zero": 0},
    "tp2-sp-dp4-zero1": {"tp": 2, "dp": 4, "sequence_parallel": True},
    "tp4-sp-dp2-zero1": {"tp": 4, "dp": 2, "sequence_parallel": True},
    "tp4-dp2-zero0": {"tp": 4, "dp": 2, "zero": 0},
    "pp4-layout": {"pp": 4, "layout": "E|t|t|L"},
    "pp2-vpp2-layout": {"pp": 2, "vpp": 2, "layout": "E|t|t|L"},
    "pp2-vpp2-tp2-sp-dp2": {
        "pp": 2,
        "vpp": 2,
        "tp": 2,
        "dp": 2,
        "sequence_parallel": True,
        "layout": "Et||t|L",
    },
    "pp4-zb-v": {"pp": 4, "vpp": 2, "schedule": "zb-v", "layout": "E|||t||t||L"},
    "pp2-zb-v-tp2-sp-dp2": {
        "pp": 2,
        "vpp": 2,
        "tp": 2,
        "dp": 2,
        "sequence_parallel": True,
        "schedule": "zb-v",
        "layout": "Et||t|L",
    },
    "pp4-zb-dp2-zero0": {
        "pp": 4,
        "dp": 2,
        "schedule": "zb-h1",
        "layout": "E|t|t|L",
        "zero": 0,
    },
}
LONG_MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"num_query_groups": 4},
    "gpt2": GPT2,
}


def world(parallel: dict[str, Any]) -> int:
    return prod(int(parallel.get(axis, 1)) for axis in ("tp", "dp", "pp", "cp"))


@cache
def reference(models: str, model: str, steps: int) -> RankResult:
    shape = {"short": MODELS, "long": LONG_MODELS}[models][model]
    config = make_config(shape, {"dp": 1}, steps=steps)
    results: list[RankResult] = run_ranks(parity.run_layout, 1, config)
    return results[0]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[] if name in IN_CHECK else pytest.mark.parity)
        for name in LAYOUTS
    ],
)
def test_layout_equals_one_rank(model: str, layout: str, steps: int) -> None:
    compare(MODELS[model], LAYOUTS[layout], reference("short", model, steps))


@pytest.mark.parity
@pytest.mark.parametrize("model", LONG_MODELS)
@pytest.mark.parametrize("layout", LONG_LAYOUTS)
def test_larger_layout_equals_one_rank(model: str, layout: str, steps: int) -> None:
    compare(LONG_MODELS[model], LONG_LAYOUTS[layout], reference("long", model, steps))


@pytest.mark.parametrize(
    "layout",
    [
        name if name == "tp4" else pytest.param(name, marks=pytest.mark.parity)
        for name in SHARED_HEADS
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_fewer_key_value_heads_than_ranks(layout: str, bias: bool, steps: int) -> None:
    model = LLAMA | {"num_attention_heads": 8, "num_query_groups": 2, "linear_bias": bias}
    one = run_ranks(parity.run_layout, 1, make_config(model, {"dp": 1}, steps=steps))[0]
    compare(model, SHARED_HEADS[layout], one)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[] if name == "tp2-sp" else pytest.mark.parity)
        for name in ("tp2-sp", "pp2-zb-v", "cp2-p2p")
    ],
)
def test_compiled_blocks_equal_one_plain_rank(layout: str, steps: int) -> None:
    parallel = (LAYOUTS | CONTEXT_LAYOUTS)[layout]
    compare(LLAMA, parallel, reference("short", "llama", steps), compiled=True)


def compare(
    model: dict[str, Any],
    layout: dict[str, Any],
    one: RankResult,
    choices: np.ndarray | None = None,
    *,
    compiled: bool = False,
) -> None:
    """Trains in the layout for as many steps as one rank did, and compares with it.

    `choices`: the experts that routers take.
    """
    parallel = {"dp": 1} | layout | SMALL_BUCKETS
    config = make_config(model, parallel, steps=len(one.losses), compiled=compiled)
    results = run_ranks(
        parity.run_layout, world(parallel), config, 5, choices, timeout_s=180
    )

    def whole(
        choose: Callable[[RankResult], Any], ranks: list[RankResult]
    ) -> dict[str, np.ndarray]:
        return assemble(config, [choose(result) for result in ranks])

    initial = whole(lambda result: result.initial, results)
    for name, tensor in whole(lambda result: result.initial, [one]).items():
        assert np.array_equal(initial[name], tensor), f"{name} starts differently"
    gradients, vanishing = split_vanishing(config, whole(lambda r: r.gradients, results))
    expected, _ = split_vanishing(config, whole(lambda r: r.gradients, [one]))
    distance = worst_relative_l2(gradients, expected)
    assert distance[0] <= 5e-6, distance
    largest = max(float(np.linalg.norm(tensor)) for tensor in expected.values())
    assert all(np.linalg.norm(tensor) <= 1e-6 * largest for tensor in vanishing.values())
    for result in results:
        np.testing.assert_allclose(result.losses, one.losses, rtol=1e-5)
        np.testing.assert_allclose(result.grad_norms, one.grad_norms, rtol=1e-5)
        np.testing.assert_allclose(result.other_losses, one.other_losses, rtol=1e-5)
    weights, expected = (whole(lambda r: r.weights, ranks) for ranks in (results, [one]))
    assert (
        max(float(np.abs(weights[name] - expected[name]).max()) for name in expected)
        <= 1e-5
    )
    distance = worst_relative_l2(
        split_vanishing(config, weights)[0], split_vanishing(config, expected)[0]
    )
    assert distance[0] <= 1e-5, distance
    assert one.losses[-1] < one.losses[0] - 0.1, (
        "nothing was learnt, so nothing was compared"
    )


def distance_from(truth: dict[str, np.ndarray], measured: dict[str, np.ndarray]) -> float:
    """Relative L2 of all gradients together."""
    squared = sum(
        float(np.square(measured[name].astype(np.float64) - tensor).sum())
        for name, tensor in truth.items()
    )
    return float(
        np.sqrt(squared / sum(float(np.square(tensor).sum()) for tensor in truth.values()))
    )


@pytest.mark.parametrize(
    "layouts", ["check", pytest.param("rest", marks=pytest.mark.parity)]
)
@pytest.mark.parametrize("model", MODELS)
def test_bf16_layouts_stay_as_close_to_float64_as_one_bf16_rank(
    model: str, layouts: str
) -> None:
    one = make_config(MODELS[model], {"dp": 1}, steps=2, precision="bf16")
    truth = run_ranks(parity.float64_gradients, 1, one)[0]

    def distance(parallel: dict[str, Any]) -> float:
        config = make_config(
            MODELS[model], {"dp": 1} | parallel | SMALL_BUCKETS, steps=2, precision="bf16"
        )
        results = run_ranks(parity.run_layout, world(parallel), config, 1)
        return distance_from(
            truth, assemble(config, [result.gradients for result in results])
        )

    allowed = 1.3 * distance({})
    assert allowed < 0.1
    for name, parallel in LAYOUTS.items():
        if (name in IN_CHECK) == (layouts == "check"):
            assert distance(parallel) <= allowed, parallel
