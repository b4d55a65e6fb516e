"""Experts in every layout equal one rank.

Routers replay one rank's choices, since a tie that falls the other way is another
model.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.sampler import sample_ids
from megatron_ray.inference.generate import generate, load_model
from megatron_ray.parallel_dims import ParallelDims
from tests.parallel.test_checkpoint_training import config as checkpoint_config
from tests.parallel.test_checkpoint_training import goes_on_here_and_elsewhere
from tests.parallel.test_parity import compare, distance_from
from tests.support import parity
from tests.support.parity import LLAMA, RankResult, assemble, make_config, record_choices
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel

MOE: dict[str, Any] = {
    "num_experts": 4,
    "top_k": 2,
    "ffn_hidden_size": 48,
    "aux_loss_coeff": 0.02,
    "z_loss_coeff": 1e-3,
}
MODELS = {
    "softmax": LLAMA | {"moe": MOE},
    "shared": LLAMA
    | {
        "moe": MOE
        | {
            "shared_expert_ffn_hidden_size": 32,
            "aux_loss": "seq_aux_loss",
            "layer_pattern": [0, 1],
        }
    },
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
# Capacity is a share of a rank's tokens, so these are compared where ranks have as many
# tokens of a microbatch as one rank.
DROPPING = {
    "dropping": LLAMA | {"moe": MOE | {"capacity_factor": 0.75}},
    "padded": LLAMA
    | {
        "moe": MOE
        | {"capacity_factor": 0.75, "pad_to_capacity": True, "drop_policy": "position"}
    },
}
SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ep2-tp2-etp1": ("softmax", SP | {"ep": 2, "etp": 1}),
    "ep2-tp2-etp2-dp2": ("shared", SP | {"dp": 2, "ep": 2}),
    "ep2-pp2-zb": ("sigmoid", {"dp": 2, "ep": 2, "pp": 2, "schedule": "zb-h1"}),
    "ep2-overlap": ("shared", {"dp": 2, "ep": 2, "ep_comm_overlap": True}),
    "ep2-allgather": ("dropping", {"dp": 2, "ep": 2, "dispatcher": "allgather"}),
}
LONG_LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2},
    "tp2": SP,
    "ep2": {"dp": 2, "ep": 2},
    "ep2-zero0": {"dp": 2, "ep": 2, "zero": 0},
    "ep2-allgather": {"dp": 2, "ep": 2, "dispatcher": "allgather"},
    "ep2-zero3": {"dp": 2, "ep": 2, "zero": 3},
    "ep2-dp4-zero3": {"dp": 4, "ep": 2, "zero": 3},
    "ep2-dp4-hsdp": {"dp": 4, "ep": 2, "zero": 3, "zero_replicas": 2},
    "ep2-dp4": {"dp": 4, "ep": 2},
    "ep2-dp4-zero0": {"dp": 4, "ep": 2, "zero": 0},
    "ep4-dp4": {"dp": 4, "ep": 4},
    "ep2-tp2-dp2-etp1": SP | {"dp": 2, "ep": 2, "etp": 1},
    "ep2-tp2-dp2-zero0": SP | {"dp": 2, "ep": 2, "zero": 0},
    "ep2-tp2-dp2-allgather": SP | {"dp": 2, "ep": 2, "dispatcher": "allgather"},
    "etp4-tp2-dp2": SP | {"dp": 2, "etp": 4},
    "ep2-pp2": {"dp": 2, "ep": 2, "pp": 2},
    "ep2-pp2-overlap": {"dp": 2, "ep": 2, "pp": 2, "ep_comm_overlap": True},
    "ep2-pp2-zb": {"dp": 2, "ep": 2, "pp": 2, "schedule": "zb-h1"},
    "ep2-cp2": {"cp": 2, "ep": 2},
    "ep2-cp2-dp2-allgather": {"cp": 2, "dp": 2, "ep": 2, "dispatcher": "allgather"},
    "ep2-tp2-cp2": SP | {"cp": 2, "ep": 2},
    "ep2-tp2-pp2": SP | {"dp": 2, "ep": 2, "pp": 2},
}


@cache
def reference(model: str, steps: int) -> tuple[RankResult, np.ndarray]:
    """One rank, choosing freely, and what it chose."""
    config = make_config((MODELS | DROPPING)[model], {"dp": 1}, steps=steps)
    (one,) = run_ranks(parity.run_layout, 1, config, timeout_s=180)
    return one, record_choices(config, one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_in_a_layout_equal_one_rank(layout: str, steps: int) -> None:
    model, parallel = LAYOUTS[layout]
    one, choices = reference(model, steps)
    compare((MODELS | DROPPING)[model], parallel, one, choices)


@pytest.mark.parity
@pytest.mark.parametrize("model", DROPPING)
@pytest.mark.parametrize(
    "layout",
    [name for name, parallel in LONG_LAYOUTS.items() if not parallel.keys() & {"tp", "cp"}],
)
def test_full_experts_send_the_same_tokens_away_in_every_layout(
    layout: str, model: str, steps: int
) -> None:
    one, choices = reference(model, steps)
    compare(DROPPING[model], LONG_LAYOUTS[layout], one, choices)


@pytest.mark.parity
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LONG_LAYOUTS)
def test_experts_in_more_layouts_equal_one_rank(
    layout: str, model: str, steps: int
) -> None:
    one, choices = reference(model, steps)
    compare(MODELS[model], LONG_LAYOUTS[layout], one, choices)


@pytest.mark.parametrize(
    "layout",
    [
        {"dp": 2, "ep": 2},
        pytest.param(
            SP | {"dp": 2, "ep": 2, "etp": 1, "dispatcher": "allgather"},
            marks=pytest.mark.parity,
        ),
    ],
)
def test_routers_that_choose_freely_agree_with_one_rank_on_the_first_step(
    layout: dict[str, Any], steps: int
) -> None:
    _, choices = reference("softmax", steps)
    config = make_config(MODELS["softmax"], layout, steps=1)
    dims = ParallelDims.of(config.parallel)
    training = config.training
    same = total = 0
    for rank, result in enumerate(run_ranks(parity.run_layout, dims.world_size, config)):
        place = dims.coordinates(rank)
        size = training.micro_batch_size
        blocks = sample_ids(
            0, size, place["dp"], dims.dp, training.global_batch_size // (size * dims.dp)
        )
        for index, (layer, experts) in enumerate(result.choices):
            rows = choices[0][blocks[index // config.model.num_layers], :, layer].reshape(
                -1, experts.shape[1]
            )
            expected = np.split(rows, dims.tp)[place["tp"]]
            same += int((np.sort(experts) == np.sort(expected)).all(1).sum())
            total += len(experts)
    assert (
        total == training.global_batch_size * training.seq_length * config.model.num_layers
    )
    assert same >= 0.999 * total


@pytest.mark.parity
@pytest.mark.parametrize(
    "layout", [{"dp": 2, "ep": 2}, SP | {"dp": 2, "ep": 2}], ids=["ep2", "ep2-tp2-dp2"]
)
def test_bf16_experts_stay_as_close_to_float64_as_one_bf16_rank(
    layout: dict[str, Any], steps: int
) -> None:
    _, choices = reference("shared", steps)

    def config(parallel: dict[str, Any]) -> TrainConfig:
        return make_config(MODELS["shared"], parallel, steps=2, precision="bf16")

    truth = run_ranks(parity.float64_gradients, 1, config({"dp": 1}), choices)[0]

    def distance(parallel: dict[str, Any]) -> float:
        ranks = ParallelDims.of(config(parallel).parallel).world_size
        results = run_ranks(
            parity.run_layout, ranks, config(parallel), 1, choices, timeout_s=180
        )
        return distance_from(
            truth, assemble(config(parallel), [result.gradients for result in results])
        )

    allowed = 1.3 * distance({"dp": 1})
    assert allowed < 0.1
    assert distance(layout) <= allowed


def with_experts(settings: TrainConfig) -> TrainConfig:
    fields = settings.model_dump()
    fields["model"]["moe"] = MOE | {
        "score_function": "sigmoid",
        "expert_bias": True,
        "bias_update_rate": 0.01,
        "capacity_factor": 4.0,
    }
    return TrainConfig.from_mapping(fields)


def test_experts_and_their_bias_resume_exactly_and_change_places(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(
        "\n".join(f"line {number}: {number * number} is a square" for number in range(400))
    )
    settings = with_experts(checkpoint_config(tmp_path, 1, 2, ep=2))
    data = prepare(settings.data, str(tmp_path / "cache"), seq_length=32)
    elsewhere = with_experts(checkpoint_config(tmp_path, 2, 2, ep=2, etp=2))
    _, half = goes_on_here_and_elsewhere(run_ranks, settings, elsewhere, data, rel=1e-5)
    model, tokenizer = load_model(half)
    moved = model.get_buffer("layers.1.moe.expert_bias.value")
    assert 0.01 <= float(moved.abs().max()) <= 0.041, "four steps"
    assert len(generate(model, tokenizer, "line 7: ", 24, temperature=0).tokens) > 0
