"""Experts in every layout equal one rank. Routers replay one rank's choices, since a tie that falls the other way is another model."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.parallel import parity
from tests.parallel.parity import LLAMA, RankResult, make_config
from tests.parallel.test_parity import STEPS, compare
from tests.ranks import run_ranks

pytestmark = pytest.mark.parallel

MOE: dict[str, Any] = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48, "aux_loss_coeff": 0.02, "z_loss_coeff": 1e-3}
MODELS = {
    "softmax": LLAMA | {"moe": MOE},
    "shared": LLAMA | {"moe": MOE | {"shared_expert_ffn_hidden_size": 32, "aux_loss": "seq_aux_loss", "layer_pattern": [0, 1]}},
    "sigmoid": LLAMA
    | {
        "activation": "gelu_tanh",
        "moe": MOE
        | {
            "score_function": "sigmoid",
            "scaling_factor": 1.5,
            "num_groups": 2,
            "group_top_k": 1,
            "expert_bias": True,
            "bias_update_rate": 0.05,
            "aux_loss_coeff": 0.0,
        },
    },
}
SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ep2": ("softmax", {"dp": 2, "ep": 2}),
    "ep2-tp2-etp1": ("softmax", SP | {"ep": 2, "etp": 1}),
    "ep2-tp2-etp2-dp2": ("shared", SP | {"dp": 2, "ep": 2}),
    "ep2-pp2-zb": ("sigmoid", {"dp": 2, "ep": 2, "pp": 2, "schedule": "zb-h1"}),
}
LONG_LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2},
    "tp2": SP,
    "ep2-zero0": {"dp": 2, "ep": 2, "zero": 0},
    "ep2-allgather": {"dp": 2, "ep": 2, "dispatcher": "allgather"},
    "ep2-dp4": {"dp": 4, "ep": 2},
    "ep2-dp4-zero0": {"dp": 4, "ep": 2, "zero": 0},
    "ep4-dp4": {"dp": 4, "ep": 4},
    "ep2-tp2-dp2-etp1": SP | {"dp": 2, "ep": 2, "etp": 1},
    "ep2-tp2-dp2-zero0": SP | {"dp": 2, "ep": 2, "zero": 0},
    "ep2-tp2-dp2-allgather": SP | {"dp": 2, "ep": 2, "dispatcher": "allgather"},
    "etp4-tp2-dp2": SP | {"dp": 2, "etp": 4},
    "ep2-pp2": {"dp": 2, "ep": 2, "pp": 2},
    "ep2-pp2-zb": {"dp": 2, "ep": 2, "pp": 2, "schedule": "zb-h1"},
    "ep2-cp2": {"cp": 2, "ep": 2},
    "ep2-cp2-dp2-allgather": {"cp": 2, "dp": 2, "ep": 2, "dispatcher": "allgather"},
    "ep2-tp2-cp2": SP | {"cp": 2, "ep": 2},
    "ep2-tp2-pp2": SP | {"dp": 2, "ep": 2, "pp": 2},
}


@cache
def reference(model: str) -> tuple[RankResult, np.ndarray]:
    """One rank, choosing freely, and what it chose: [steps, samples, tokens, layers, K]; layers without experts are never asked."""
    config = make_config(MODELS[model], {"dp": 1}, steps=STEPS)
    (one,) = run_ranks(parity.run_layout, 1, config)
    assert config.model.moe is not None
    training, layers = config.training, config.model.num_layers
    samples, length = training.micro_batch_size, training.seq_length
    choices = np.full((STEPS, training.global_batch_size, length, layers, config.model.moe.top_k), -1, dtype=np.int64)
    seen = dict.fromkeys(range(layers), 0)
    for layer, experts in one.choices:
        step, start = divmod(seen[layer], training.global_batch_size)
        choices[step, start : start + samples, :, layer] = experts.reshape(samples, length, -1)
        seen[layer] += samples
    assert set(seen.values()) <= {0, STEPS * training.global_batch_size}
    return one, choices


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_in_a_layout_equal_one_rank(layout: str) -> None:
    model, parallel = LAYOUTS[layout]
    one, choices = reference(model)
    compare(MODELS[model], parallel, one, choices)


@pytest.mark.parity
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LONG_LAYOUTS)
def test_experts_in_more_layouts_equal_one_rank(layout: str, model: str) -> None:
    one, choices = reference(model)
    compare(MODELS[model], LONG_LAYOUTS[layout], one, choices)
