"""What FP8 refuses names field, numbers and the nearest legal value, which then is legal."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.config.training import Fp8Config
from megatron_ray.validation import check

MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 512,
}
EXPERTS = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 256}
LATENTS = {
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}


def config(**groups: dict[str, Any]) -> TrainConfig:
    training = {
        "seq_length": 256,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "steps": 10,
        "precision": "bf16",
    }
    return TrainConfig.from_mapping(
        {
            "model": MODEL | groups.get("model", {}),
            "parallel": groups.get("parallel", {}),
            "training": training | groups.get("training", {}),
            "data": {"train": [{"path": "builtin://python-stdlib"}]},
            "optimizer": {"lr": 1e-3},
        }
    )


def fp8(recipe: str, **fields: Any) -> dict[str, Any]:
    return {"fp8": {"recipe": recipe, **fields}}


@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise", "mxfp8"])
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"moe": EXPERTS | {"shared_expert_ffn_hidden_size": 256}},
        {"mla": LATENTS, "num_query_groups": 4},
    ],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_good_sizes_are_legal(recipe: str, model: dict[str, Any], tp: int) -> None:
    parallel = {"tp": tp, "sequence_parallel": tp > 1, "etp": 1}
    if recipe == "blockwise" and tp > 1:
        # Blocks of 128 elements need wider heads.
        model = model | {"hidden_size": 512, "num_query_groups": 4}
    legal = config(model=model, parallel=parallel, training=fp8(recipe))
    assert not check.find_problems(legal)


@pytest.mark.parametrize(
    ("groups", "pointer", "words"),
    [
        (
            {"training": {"precision": "fp16", **fp8("current")}},
            "/training/fp8",
            "fp8 is for precision=bf16, not for fp16: what is not multiplied in FP8 is bf16; "
            "set precision to bf16, or leave fp8 out",
        ),
        (
            {"training": fp8("current", margin=2)},
            "/training/fp8/margin",
            "margin=2 is for recipe=delayed, not for current, whose scales come from the "
            "tensors themselves; leave it out",
        ),
        (
            {"training": fp8("mxfp8", amax_algorithm="max")},
            "/training/fp8/amax_algorithm",
            "amax_algorithm=max is for recipe=delayed",
        ),
        (
            {"training": fp8("current", param_gather=True)},
            "/training/fp8/param_gather",
            "param_gather needs zero=3, not 1, which gathers no weights before their "
            "products; leave it out, or use zero=3",
        ),
        (
            {"training": fp8("delayed", param_gather=True), "parallel": {"zero": 3}},
            "/training/fp8/param_gather",
            "param_gather is for recipe=current: delayed looks for the largest value of whole "
            "weights in each product; use current, or leave param_gather out",
        ),
        (
            {"training": fp8("blockwise", param_gather=True), "parallel": {"zero": 3}},
            "/training/fp8/param_gather",
            "blockwise has a scale for 128 x 128 elements, which ranks share; use current",
        ),
        (
            {"training": fp8("mxfp8", param_gather=True), "parallel": {"zero": 3}},
            "/training/fp8/param_gather",
            "mxfp8 quantizes a weight and its transpose differently; use current",
        ),
        (
            {"training": fp8("blockwise", format="hybrid")},
            "/training/fp8/format",
            "the kernels of blockwise multiply e4m3 only; leave it out",
        ),
        (
            {"training": fp8("current", first_layers_in_bf16=1, last_layers_in_bf16=3)},
            "/training/fp8",
            "first_layers_in_bf16 + last_layers_in_bf16 = 1 + 3 leave none of the 4 layers to "
            "multiply in FP8; lower one of them, or leave fp8 out",
        ),
        (
            {"training": {"seq_length": 250, **fp8("delayed")}},
            "/training/seq_length",
            "seq_length=250 gives products of 250 elements on a rank, and fp8.recipe=delayed "
            "needs a multiple of 16; the nearest seq_length is 256",
        ),
        (
            {"model": {"ffn_hidden_size": 500}, "training": fp8("mxfp8")},
            "/model/ffn_hidden_size",
            "needs a multiple of 32; the nearest ffn_hidden_size is 512",
        ),
        (
            {
                "model": {"ffn_hidden_size": 600},
                "parallel": {"tp": 2},
                "training": fp8("current"),
            },
            "/model/ffn_hidden_size",
            "ffn_hidden_size=600 over tp=2 gives products of 300 elements on a rank, and "
            "fp8.recipe=current needs a multiple of 16; the nearest ffn_hidden_size is 608",
        ),
        (
            {"parallel": {"tp": 2}, "training": fp8("blockwise")},
            "/model/head_dim",
            "head_dim=64 x 2 over tp=2 gives products of 64 elements on a rank, and "
            "fp8.recipe=blockwise needs a multiple of 128; the nearest head_dim is 128",
        ),
        (
            {
                "parallel": {"tp": 2, "sequence_parallel": True, "tp_comm_overlap": True},
                "training": fp8("current"),
            },
            "/parallel/tp_comm_overlap",
            "tp_comm_overlap multiplies the tokens of each of tp=2 ranks by themselves, and "
            "fp8.recipe=current quantizes all of them at once; leave tp_comm_overlap or fp8 "
            "out",
        ),
        (
            {
                "model": {"moe": EXPERTS | {"ffn_hidden_size": 200}},
                "training": fp8("current"),
            },
            "/model/moe/ffn_hidden_size",
            "ffn_hidden_size=200 gives products of 200 elements on a rank, and "
            "fp8.recipe=current needs a multiple of 16; the nearest ffn_hidden_size is 192",
        ),
        (
            {
                "model": {"mla": LATENTS | {"kv_lora_rank": 40}, "num_query_groups": 4},
                "training": fp8("current"),
            },
            "/model/mla/kv_lora_rank",
            "the nearest kv_lora_rank is 32",
        ),
    ],
)
def test_a_refusal_names_field_numbers_and_remedy(
    groups: dict[str, Any], pointer: str, words: str
) -> None:
    (problem,) = check.find_problems(config(**groups))
    assert problem.pointer == pointer
    assert words in problem.detail


def test_weights_are_gathered_in_fp8_under_zero3() -> None:
    parallel = {"zero": 3, "dp": 2, "tp": 2}
    training = fp8("current", param_gather=True)
    assert not check.find_problems(config(parallel=parallel, training=training))


def test_layers_at_the_ends_stay_in_bf16() -> None:
    ends = Fp8Config(recipe="current", first_layers_in_bf16=1, last_layers_in_bf16=2)
    assert [layer for layer in range(6) if ends.covers(layer, 5)] == [1, 2]
    whole = Fp8Config(recipe="current")
    # The last is a layer of multi-token prediction.
    assert [layer for layer in range(6) if whole.covers(layer, 5)] == list(range(6))
