"""Layers by Transformer Engine are those of the local spec: the same parameters, and the same
numbers in every layout. The library needs a GPU, so a stand-in with its recorded signatures
computes here; `test_transformer_engine_gpu.py` compares the library itself.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ray.checkpoint.directory import commit, list_checkpoints
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.inference.generate import generate, load_model
from megatron_ray.parallelize.parallelize import parallelize
from megatron_ray.parallelize.transformer_engine.apply import apply_transformer_engine
from tests.parallel import test_checkpoint_training as resuming
from tests.support import parity
from tests.support.parity import GPT2, LLAMA, RankResult, make_config
from tests.support.ranks import run_ranks
from tests.support.transformer_engine import installed, stand_in

pytestmark = pytest.mark.parallel
corpus = resuming.corpus

STEPS = 4
EXPERTS = LLAMA | {
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "ffn_hidden_size": 48,
        "shared_expert_ffn_hidden_size": 32,
    }
}
LATENTS = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
GEMMA = LLAMA | {"zero_centered_norm": True, "activation": "geglu_tanh", "peri_norm": True}
WINDOWS = LLAMA | {"sliding_window": 8, "full_attention_every": 2, "qk_norm": True}


def config_of(
    model: dict[str, Any],
    parallel: dict[str, Any],
    *,
    spec: str = "transformer_engine",
    separate_documents: bool = False,
    **training: Any,
) -> TrainConfig:
    fields = make_config(
        model | {"spec": spec},
        {"dp": 1} | parallel,
        steps=STEPS,
        separate_documents=separate_documents,
    ).model_dump()
    fields["training"] |= training
    return TrainConfig.from_mapping(fields)


def run_with(rank: int, world_size: int, config: TrainConfig) -> RankResult:
    with installed() as watched:
        result = parity.run_layout(rank, world_size, config, STEPS - 1)
    assert bool(watched.modules) == (config.model.spec == "transformer_engine")
    return result


def assert_same(config: TrainConfig, results: list[RankResult], local: RankResult) -> None:
    for part, tolerance in (("initial", 0.0), ("gradients", 2e-6), ("weights", 2e-5)):
        ours = parity.assemble(config, [getattr(each, part) for each in results])
        expected = parity.assemble(config, [getattr(local, part)])
        ours, zero = parity.split_vanishing(config, ours)
        expected = {name: expected[name] for name in ours}
        if part == "gradients":
            assert all(np.abs(tensor).max() < 1e-6 for tensor in zero.values())
        distance, name = parity.worst_relative_l2(ours, expected)
        assert distance <= tolerance, (part, name, distance)
    np.testing.assert_allclose(results[-1].losses, local.losses, rtol=2e-6)


@pytest.mark.parametrize(
    "model",
    [LLAMA, GPT2, GEMMA, WINDOWS, EXPERTS, LLAMA | {"mla": LATENTS, "num_query_groups": 4}],
    ids=["llama", "gpt2", "gemma", "windows", "experts", "latents"],
)
def test_a_model_is_that_of_the_local_spec(model: dict[str, Any]) -> None:
    local = run_with(0, 1, config_of(model, {}, spec="local"))
    config = config_of(model, {})
    assert_same(config, [run_with(0, 1, config)], local)


Case = tuple[dict[str, Any], dict[str, Any]]
SPLIT = {"tp": 2, "sequence_parallel": True}
CASES: dict[str, Case] = {
    "tp2": (GPT2, {"tp": 2}),
    "tp2-sp": (GPT2, SPLIT),
    "tp2-sp-llama": (LLAMA | {"num_query_groups": 1}, SPLIT),
    "tp2-sp-experts": (EXPERTS, SPLIT | {"etp": 2}),
    # Forward passes of later microbatches run before the first backward pass.
    "pp2": (LLAMA, {"pp": 2}),
    "dp2-overlap": (LLAMA, {"dp": 2, "zero": 1, "overlap_param_gather": True}),
    "ep2": (EXPERTS, {"dp": 2, "ep": 2}),
    "cp2": (LLAMA, {"cp": 2}),
}


def run_cases(rank: int, world_size: int, configs: list[TrainConfig]) -> list[RankResult]:
    return [run_with(rank, world_size, config) for config in configs]


def test_every_layout_is_one_rank_of_the_local_spec() -> None:
    configs = [config_of(model, parallel) for model, parallel in CASES.values()]
    ranks = run_ranks(run_cases, 2, configs, timeout_s=240)
    for case, (model, parallel) in enumerate(CASES.values()):
        local = run_with(0, 1, config_of(model, {}, spec="local"))
        results = [of_rank[case] for of_rank in ranks]
        assert_same(config_of(model, parallel), results, local)


RECOMPUTED: list[dict[str, Any]] = [
    {"granularity": "full", "method": "uniform", "num_layers": 1},
    {"granularity": "selective", "modules": ["core_attention", "activation"]},
    {"granularity": "selective", "modules": ["mlp"]},
]


@pytest.mark.parametrize("recompute", RECOMPUTED, ids=["full", "parts", "mlp"])
def test_recomputation_changes_no_bit(recompute: dict[str, Any]) -> None:
    plain = run_with(0, 1, config_of(LLAMA, {}))
    again = run_with(0, 1, config_of(LLAMA, {}, recompute=recompute))
    for part in ("gradients", "weights"):
        for (name, _, values), (_, _, expected) in zip(
            getattr(again, part), getattr(plain, part), strict=True
        ):
            np.testing.assert_array_equal(values, expected, err_msg=name)


def test_documents_are_kept_apart() -> None:
    local = run_with(0, 1, config_of(WINDOWS, {}, spec="local", separate_documents=True))
    config = config_of(WINDOWS, {}, separate_documents=True)
    assert_same(config, [run_with(0, 1, config)], local)


def test_frozen_tensors_stay_and_the_others_are_those_of_the_local_spec() -> None:
    def frozen(spec: str) -> TrainConfig:
        fields = config_of(GPT2, {}, spec=spec).model_dump()
        fields["optimizer"]["freeze"] = [
            "embedding.*",
            "layers.0.attention_norm.weight",
            "layers.0.attention.q.weight",
            "layers.0.attention.k.weight",
            "layers.0.attention.v.weight",
            "layers.1.mlp.up.bias",
        ]
        return TrainConfig.from_mapping(fields)

    results = [run_with(0, 1, frozen(spec)) for spec in ("transformer_engine", "local")]
    ours, local = results
    for part, rtol in (("initial", 0.0), ("weights", 1e-4)):
        for (name, _, values), (_, _, expected) in zip(
            getattr(ours, part), getattr(local, part), strict=True
        ):
            if not name.endswith("attention.k.bias"):
                np.testing.assert_allclose(values, expected, rtol, 1e-6, err_msg=name)
    np.testing.assert_allclose(ours.losses, local.losses, rtol=2e-6)


@pytest.mark.parametrize(
    ("recipe", "kind", "form"),
    [
        ("current", "Float8CurrentScaling", "HYBRID"),
        ("blockwise", "Float8BlockScaling", "E4M3"),
        ("mxfp8", "MXFP8BlockScaling", "E4M3"),
    ],
)
def test_chosen_layers_multiply_by_the_recipe(recipe: str, kind: str, form: str) -> None:
    """And experts' rows are padded, which changes no number."""
    model = EXPERTS | {"num_layers": 3}
    fp8 = {"recipe": recipe, "first_layers_in_bf16": 1}
    config = config_of(model, {}, precision="bf16", fp8=fp8)
    in_bf16 = run_with(0, 1, config_of(model, {}, precision="bf16"))
    with installed() as watched:
        result = parity.run_layout(0, 1, config, STEPS - 1)
    of_layer = len(watched.recipes) // 3
    # qkv, o, two of the shared expert and two of experts; the first pass of three layers.
    num_products = 6
    first, *others = (
        watched.recipes[start : start + num_products]
        for start in range(0, 3 * num_products, num_products)
    )
    assert of_layer % num_products == 0
    assert {used for _, used in first} == {None}
    for layer in others:
        assert {(used.kind, used.fp8_format.name) for _, used in layer} == {(kind, form)}
        assert [name for name, _ in layer].count("GroupedLinear") == 2
    np.testing.assert_allclose(result.losses, in_bf16.losses, rtol=1e-3)


def test_the_norm_before_a_product_is_part_of_it() -> None:
    engine, watched = stand_in()
    config = config_of(LLAMA, {}, spec="local")
    model = parallelize(config, ParallelMesh.single())
    apply_transformer_engine(model.module, None, engine)
    kinds = [type(module).__name__ for module in watched.modules]
    assert kinds.count("LayerNormLinear") == 4
    assert kinds.count("Linear") == 4
    hidden = torch.randn(6, 64)
    block = model.module.blocks[0]
    assert block.attention_norm(hidden) is hidden


def resumed(
    folder: Path, data: PreparedData, specs: tuple[str, str]
) -> tuple[dict[int, Any], str]:
    """Steps of a run that changes its spec halfway, and its checkpoint there."""

    def in_bf16(spec: str) -> TrainConfig:
        fields = resuming.config(folder, 1, 1).model_dump()
        fields["model"]["spec"] = spec
        fields["training"]["precision"] = "bf16"
        fields["storage"]["path"] = str(folder / "-".join(specs))
        return TrainConfig.from_mapping(fields)

    first, second = specs
    with installed():
        resuming.train(0, 1, in_bf16(first), data, 1, None)
        half, _ = (info.path for info in list_checkpoints(str(folder / "-".join(specs))))
        commit(half, {}, [])
        return resuming.train(0, 1, in_bf16(second), data, 2, half), half


def test_a_checkpoint_goes_on_in_the_other_spec(
    tmp_path: Path, corpus: PreparedData
) -> None:
    engine, local = "transformer_engine", "local"
    expected, _ = resumed(tmp_path, corpus, (local, local))
    for specs in ((engine, local), (local, engine), (engine, engine)):
        steps, half = resumed(tmp_path, corpus, specs)
        assert steps.keys() == expected.keys()
        for step, values in steps.items():
            assert values == pytest.approx(expected[step], rel=1e-2)
    # Without the library.
    model, tokenizer = load_model(half)
    assert len(generate(model, tokenizer, "line 7: ", 4, temperature=0).tokens) > 0
