"""Latent attention and the multi-token prediction in every layout equal one rank,
with and without experts.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.inference.generate import generate, load_model
from tests.parallel.test_checkpoint_training import config as checkpoint_config
from tests.parallel.test_checkpoint_training import goes_on_here_and_elsewhere
from tests.parallel.test_parity import (
    CONTEXT_LAYOUTS,
    FULL_SHARD,
    LAYOUTS,
    SMALL_BUCKETS,
    compare,
    distance_from,
    world,
)
from tests.support import parity
from tests.support.parity import (
    LLAMA,
    RankResult,
    assemble,
    make_config,
    record_choices,
    worst_relative_l2,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel

BASE = {name: value for name, value in LLAMA.items() if name != "num_query_groups"}
MLA: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
MTP: dict[str, Any] = {"num_layers": 2, "loss_coeff": 0.3}
YARN = {
    "kind": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale_all_dim": 1.0,
}
BIASES = {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}
ROUTER: dict[str, Any] = {
    "num_experts": 8,
    "top_k": 2,
    "ffn_hidden_size": 48,
    "score_function": "sigmoid",
    "scaling_factor": 2.5,
    "num_groups": 4,
    "group_top_k": 2,
    "expert_bias": True,
    "shared_expert_ffn_hidden_size": 48,
    "aux_loss": "seq_aux_loss",
    "aux_loss_coeff": 0.01,
    "layer_pattern": [0, 1],
}
MODELS: dict[str, dict[str, Any]] = {
    "latent": BASE | {"mla": MLA, "rope_scaling": YARN},
    "latent-direct-queries": BASE | {"mla": MLA | {"q_lora_rank": None}},
    "mtp": LLAMA | {"mtp": MTP},
    "mtp-tied": LLAMA | {"mtp": MTP, "tie_embeddings": True},
    "both": BASE | BIASES | {"mla": MLA, "mtp": MTP, "rope_scaling": YARN},
    "deepseek": BASE
    | {"mla": MLA, "mtp": MTP | {"num_layers": 1}, "moe": ROUTER, "rope_scaling": YARN},
}
SP = {"tp": 2, "sequence_parallel": True}
MTP_LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2-zb-v": {"pp": 2, "vpp": 2, "schedule": "zb-v", "layout": "E|t|t|mmL"},
    "pp2-vpp2-tp2-sp": SP | {"pp": 2, "vpp": 2, "layout": "Et||t|mmL"},
    "pp4": {"pp": 4, "layout": "E|t|t|mmL"},
}
ALL = LAYOUTS | CONTEXT_LAYOUTS | FULL_SHARD | MTP_LAYOUTS
IN_CHECK = [
    ("latent", "tp2"),
    ("both", "cp2-p2p-tp2-sp"),
    ("both", "pp2-zb-v"),
    ("both", "dp2-pp2-zero3"),
    ("mtp-tied", "pp2-zb-dp2-zero1"),
]
LONG = [
    *(
        ("latent", name)
        for name in (
            "tp2-sp",
            "pp2",
            "cp2-all-gather-zero0",
            "cp2-a2a-dp2",
            "cp4-hierarchical",
            "dp2-tp2-sp-zero3",
        )
    ),
    *(("latent-direct-queries", name) for name in ("tp2", "tp2-sp-dp2-zero1")),
    *(
        ("mtp", name)
        for name in (
            "tp2",
            "tp2-sp",
            "pp2",
            "dp2-zero1",
            "dp2-zero0",
            "cp2-p2p",
            "pp2-vpp2-tp2-sp",
            "pp4",
            "dp2-zero3",
        )
    ),
    *(
        ("mtp-tied", name)
        for name in (
            "tp2-sp",
            "pp2-tp2-uneven",
            "pp2-zb-v",
            "pp2-gpipe-dp2-zero0",
            "dp2-pp2-zero3",
        )
    ),
    *(("both", name) for name in ("cp4-hierarchical", "pp2-tp2-sp", "dp4-hsdp")),
]
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2-tp2-pp2": SP | {"ep": 2, "etp": 1, "pp": 2},
    "ep2": {"dp": 2, "ep": 2},
    "ep2-zero3": {"dp": 2, "ep": 2, "zero": 3},
    "ep2-tp2-dp2": SP | {"dp": 2, "ep": 2},
    "ep2-cp2": {"cp": 2, "ep": 2},
    "ep2-pp2-zb": {"dp": 2, "ep": 2, "pp": 2, "schedule": "zb-h1"},
}


@cache
def reference(model: str, steps: int) -> RankResult:
    (one,) = run_ranks(
        parity.run_layout,
        1,
        make_config(MODELS[model], {"dp": 1}, steps=steps),
        timeout_s=180,
    )
    assert isinstance(one, RankResult)
    return one


@pytest.mark.parametrize(
    ("model", "layout"),
    [*IN_CHECK, *(pytest.param(*entry, marks=pytest.mark.parity) for entry in LONG)],
)
def test_layout_equals_one_rank(model: str, layout: str, steps: int) -> None:
    compare(MODELS[model], ALL[layout], reference(model, steps))


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-zb-v"])
def test_compiled_blocks_equal_one_plain_rank(layout: str, steps: int) -> None:
    compare(MODELS["both"], ALL[layout], reference("both", steps), compiled=True)


@pytest.mark.parametrize(
    "layout",
    [
        name if name == "ep2-tp2-pp2" else pytest.param(name, marks=pytest.mark.parity)
        for name in EXPERT_LAYOUTS
    ],
)
def test_deepseek_with_experts_in_a_layout_equals_one_rank(layout: str, steps: int) -> None:
    one = reference("deepseek", steps)
    choices = record_choices(make_config(MODELS["deepseek"], {"dp": 1}, steps=steps), one)
    compare(MODELS["deepseek"], EXPERT_LAYOUTS[layout], one, choices)


@pytest.mark.parametrize(
    "parallel",
    [
        SP | {"cp": 2},
        pytest.param({"pp": 2, "cp": 2, "cp_method": "a2a"}, marks=pytest.mark.parity),
    ],
    ids=["cp2-tp2-sp", "cp2-pp2"],
)
def test_documents_apart_in_a_layout_give_the_gradients_of_one_rank(
    parallel: dict[str, Any],
) -> None:
    by_layout = []
    for layout in ({}, parallel):
        config = make_config(
            MODELS["both"],
            {"dp": 1} | layout | SMALL_BUCKETS,
            steps=1,
            separate_documents=True,
        )
        results = run_ranks(parity.run_layout, world(layout), config, 1)
        by_layout.append(
            (assemble(config, [result.gradients for result in results]), results[0].losses)
        )
    (expected, losses), (measured, others) = by_layout
    distance = worst_relative_l2(measured, expected)
    assert distance[0] <= 5e-6, distance
    np.testing.assert_allclose(others, losses, rtol=1e-5)


def smaller(settings: TrainConfig) -> TrainConfig:
    fields = settings.model_dump()
    fields["model"] |= {"head_dim": None, "mla": MLA, "mtp": MTP, "tie_embeddings": True}
    return TrainConfig.from_mapping(fields)


def test_both_copies_of_the_embedding_are_saved_as_one_and_resume_exactly(
    tmp_path: Path,
) -> None:
    (tmp_path / "corpus.txt").write_text(
        "\n".join(f"line {number}: {number * number} is a square" for number in range(400))
    )
    settings = smaller(checkpoint_config(tmp_path, 1, 1, pp=2))
    data = prepare(settings.data, str(tmp_path / "cache"), seq_length=32)
    elsewhere = smaller(checkpoint_config(tmp_path, 2, 1))
    _, half = goes_on_here_and_elsewhere(run_ranks, settings, elsewhere, data, rel=2e-5)
    model, tokenizer = load_model(half)
    assert len(generate(model, tokenizer, "line 7: ", 24, temperature=0).tokens) > 0


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "cp2-p2p", "dp2-tp2-sp-zero3"])
def test_bf16_layouts_stay_as_close_to_float64_as_one_bf16_rank(layout: str) -> None:
    truth = run_ranks(
        parity.float64_gradients,
        1,
        make_config(MODELS["both"], {"dp": 1}, steps=2, precision="bf16"),
    )[0]

    def distance(parallel: dict[str, Any]) -> float:
        config = make_config(
            MODELS["both"], {"dp": 1} | parallel | SMALL_BUCKETS, steps=2, precision="bf16"
        )
        results = run_ranks(parity.run_layout, world(parallel), config, 1, timeout_s=180)
        return distance_from(
            truth, assemble(config, [result.gradients for result in results])
        )

    allowed = 1.3 * distance({})
    assert allowed < 0.1
    assert distance(ALL[layout]) <= allowed
