"""Families as data: config.json both ways, names, the order of rotated rows, and one
clear refusal for what is not supported.
"""

import json
import re
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_ray.checkpoint.hf.families.registry import (
    FAMILIES,
    export_warnings,
    family_for,
    find_family,
    read_model,
)
from megatron_ray.checkpoint.hf.folder import logical_shapes
from megatron_ray.checkpoint.hf.tensor_locations import InterleavedRotary, TensorLocation
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.presets.presets import PRESETS
from megatron_ray.config.problem import ConfigError
from megatron_ray.sharding.boxes import Box
from megatron_ray.validation.initial_weights import contradictions, model_signature
from tests.support import hf_folders

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
"""As Llama 3.1 8B is published."""


SMALL = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "task_specific_params": {
                "text-generation": {"do_sample": True, "max_length": 50}
            },
            "vocab_size": 50257,
        },
        124_439_808,
    ),
    "llama-3.1-8b": (
        LLAMA | {"attention_bias": False, "pretraining_tp": 1, "mlp_bias": False},
        8_030_261_248,
    ),
    "mistral-7b-v0.1": (
        SMALL
        | {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        7_241_732_096,
    ),
    "mixtral-8x7b-v0.1": (
        SMALL
        | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        46_702_792_704,
    ),
    "gemma-2b": (
        SMALL
        | {
            "architectures": ["GemmaForCausalLM"],
            "model_type": "gemma",
            "attention_bias": False,
            "head_dim": 256,
            "hidden_act": "gelu",
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "max_position_embeddings": 8192,
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "vocab_size": 256000,
        },
        2_506_172_416,
    ),
}
"""config.json as published (what no reader looks at left out), and the published number
of parameters."""


def read(values: dict[str, Any]) -> ModelConfig:
    return read_model(find_family(values, "config.json"), values, "config.json")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    for family in hf_folders.FAMILIES:
        hf_folders.publish(family, folder / family)
    return folder


@pytest.mark.parametrize("name", hf_folders.FAMILIES)
def test_a_config_read_and_written_says_the_same(published: Path, name: str) -> None:
    values = json.loads((published / name / "config.json").read_text())
    model = read(values)
    family = FAMILIES[name.partition("-")[0] if not name.startswith("llama") else "llama"]
    assert family_for(model) is family
    written = family.write(model)
    # Spelt differently on purpose, or without a meaning where no window is used.
    spelt = {
        key
        for key in written
        if values.get(key) is not None and not key.startswith(("rope", "max_window"))
    }
    assert {key: values[key] for key in spelt} == {key: written[key] for key in spelt}
    assert model_signature(read_model(family, written, "written")) == model_signature(model)


@pytest.mark.parametrize("name", hf_folders.FAMILIES)
def test_rules_list_all_stored_names_and_no_others(published: Path, name: str) -> None:
    model = read(json.loads((published / name / "config.json").read_text()))
    family = family_for(model)
    with safe_open(published / name / "model.safetensors", "pt") as file:
        keys = file.keys()  # safe_open is no mapping and cannot be iterated over
    copies = family.copies(model)
    stored = {re.sub(r"\d+", "{}", key) for key in keys if key not in copies}
    listed = {
        re.sub(r"\d+", "{}", rule.stored.replace("w{}", "w1"))
        for rule in family.rules(model)
    }
    assert stored <= listed
    plain_mlp = {
        f"model.layers.{{}}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert listed - stored <= (plain_mlp if model.moe is not None else set())


def test_both_spellings_of_rope_are_one() -> None:
    scaling = dict(LLAMA["rope_scaling"])
    newer = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    newer["rope_parameters"] = scaling | {"rope_theta": 500000.0}
    assert read(newer) == read(LLAMA)
    assert read(LLAMA).rope_scaling is not None
    assert read(LLAMA).rope_theta == 500000.0
    oldest = LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert (
        read(oldest).rope_scaling
        == ModelConfig.model_validate(
            {"preset": "llama3-8b", "rope_scaling": {"kind": "linear", "factor": 2.0}}
        ).rope_scaling
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"model_type": "opt", "architectures": ["OPTForCausalLM"]},
            "model_type='opt' with architectures=['OPTForCausalLM'] is not",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "is not supported; known: gpt2 (GPT2LMHeadModel)",
        ),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported; known: 'silu'"),
        (
            {"attention_bias": "yes"},
            "attention_bias is 'yes', true or false is needed",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type='dynamic' is not supported; known: 'default', 'llama3'",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "truncate=False is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0}},
            "attention_factor=3.0 is not supported",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None, a number is needed"),
        ({"hidden_size": 4}, "does not describe a model: model.hidden_size: "),
        (
            {"tie_word_embeddings": "yes"},
            "tie_word_embeddings is 'yes', true or false is needed",
        ),
        (
            {
                "model_type": "gpt2",
                "architectures": ["GPT2LMHeadModel"],
                "scale_attn_by_inverse_layer_idx": True,
            },
            "scale_attn_by_inverse_layer_idx=True is not supported",
        ),
        (
            {
                "model_type": "qwen2",
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 4,
            },
            "layer_types (or max_window_layers) must give every n-th layer",
        ),
        (
            {"model_type": "deepseek_v3", "architectures": None, "rope_interleave": False},
            "rope_interleave=False is not supported",
        ),
        (
            {"model_type": "deepseek_v3", "architectures": None, "norm_topk_prob": False},
            "norm_topk_prob=False is not supported; known: True",
        ),
        (
            {"model_type": "deepseek_v2", "architectures": None, "norm_topk_prob": True},
            "norm_topk_prob=True is not supported; known: False",
        ),
        (
            {"model_type": "deepseek_v2", "architectures": None, "use_mla": False},
            "use_mla=False is not supported; known: True",
        ),
    ],
)
def test_what_is_not_supported_is_named(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        read(LLAMA | changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"activation": "gelu"},
            "model.activation='gelu' cannot be expressed in the config.json of llama",
        ),
        (
            {"embedding_scale": 3.0, "qk_norm": True},
            "model.qk_norm=True cannot be expressed in the config.json of granite",
        ),
        ({"peri_norm": True}, "model.peri_norm=True cannot be expressed"),
        ({"embedding_norm": True}, "model.embedding_norm=True cannot be expressed"),
        (
            {"zero_centered_norm": True},
            "model.embedding_scale=1 is not the square root of hidden_size, 11.3137 (gemma)",
        ),
        ({"activation": "geglu_tanh"}, "model.embedding_scale=1 is not the square root"),
        (
            {"activation": "geglu_tanh", "embedding_scale": 128**0.5},
            "model.zero_centered_norm=False cannot be expressed in the config.json of gemma",
        ),
        (
            {"qkv_bias": True, "qk_norm": True},
            "model.qkv_bias=True cannot be expressed in the config.json of qwen3",
        ),
        (
            {"moe": {"num_experts": 4, "shared_expert_ffn_hidden_size": 8}},
            "model.moe.shared_expert_ffn_hidden_size=8 cannot be expressed",
        ),
        (
            {"moe": {"num_experts": 4, "layer_pattern": {"every": 2}}},
            "model.moe.layer_pattern=",
        ),
        (
            {"position_embedding": "none"},
            "model.position_embedding='none' cannot be expressed",
        ),
        (
            {"qkv_bias": True, "attention_output_bias": True, "sliding_window": 8},
            "model.qkv_bias=True cannot be expressed in the config.json of mistral",
        ),
        ({"attention_output_bias": True}, "model.qkv_bias=False cannot be expressed"),
        ({"norm": "layernorm"}, "model.activation='swiglu' is not one of 'gelu_tanh'"),
        (
            {"preset": "gemma-2b", "hidden_size": 256},
            "model.embedding_scale=45.2548 is not the square root of hidden_size, 16 (gemma)",
        ),
        ({"mla": {}}, "model.moe is null, and every such model has experts (deepseek_v3)"),
        (
            {"preset": "deepseek-tiny", "moe": {"scores_per_group": 1}},
            "model.moe.scores_per_group=1 is not the 2 of every such model",
        ),
        (
            {"preset": "deepseek-tiny", "mla": {"norm_eps": 1e-5}},
            "model.mla.norm_eps=1e-05 cannot be expressed",
        ),
    ],
)
def test_a_model_that_no_family_can_express_is_refused_and_warned_of(
    changed: dict[str, Any], words: str
) -> None:
    fields = {"preset": "gpt-tiny"} | changed
    with pytest.raises(ConfigError, match=re.escape(words)):
        family_for(ModelConfig.model_validate(fields | {"vocab_size": 300}))
    # Before training, when the vocabulary may be unknown.
    (warning,) = export_warnings(ModelConfig.model_validate(fields))
    field = words.partition("=")[0].partition(" ")[0].removeprefix("model.")
    assert warning.pointer == f"/model/{field.replace('.', '/')}"
    assert words in warning.detail


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_exported(preset: str) -> None:
    assert export_warnings(ModelConfig.model_validate({"preset": preset})) == []


def test_a_model_keeps_the_family_it_was_published_as_while_it_is_one_of_it() -> None:
    model = ModelConfig.model_validate({"preset": "llama2-7b"})
    assert family_for(model, FAMILIES["mistral"]) is FAMILIES["mistral"]
    windowed = model.model_copy(update={"sliding_window": 8})
    assert family_for(windowed, FAMILIES["llama"]) is FAMILIES["mistral"]


def test_rotated_pairs_become_halves() -> None:
    location = TensorLocation("q", rotary=InterleavedRotary(every=6, first=2, width=4))
    order: dict[int, int] = {}
    for here, there in location.pieces((12, 3), Box((0, 0), (12, 3))):
        order |= {
            here.offset[0] + row: there.offset[0] + row for row in range(here.size[0])
        }
    assert [order[row] for row in range(12)] == [0, 1, 2, 4, 3, 5, 6, 7, 8, 10, 9, 11]
    middle = list(location.pieces((12, 3), Box((3, 1), (2, 1))))
    assert [(here.offset, there.offset) for here, there in middle] == [
        ((3, 1), (4, 1)),
        ((4, 1), (3, 1)),
    ]


def test_rotated_rows_compute_what_transformers_computes() -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        apply_rotary_pos_emb_interleave,
    )
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rotary = InterleavedRotary(8, 0, 8)
    width = 8
    values = torch.randn(1, 2, 5, width)
    angles = torch.randn(1, 5, width // 2)
    cos, sin = (
        function(torch.cat((angles, angles), -1)) for function in (torch.cos, torch.sin)
    )
    interleaved, _ = apply_rotary_pos_emb_interleave(values, values, cos, sin)
    order = [rotary.stored_row(row) for row in range(width)]
    halves, _ = apply_rotary_pos_emb(values[..., order], values[..., order], cos, sin)
    torch.testing.assert_close(
        halves @ halves.transpose(2, 3), interleaved @ interleaved.transpose(2, 3)
    )


BASE = {"preset": "gpt-tiny", "vocab_size": 300}
OUTPUT_BIAS = "/model/attention_output_bias"


@pytest.mark.parametrize(
    ("run", "weights", "pointers"),
    [
        ({}, {}, []),
        (
            {
                "hidden_dropout": 0.1,
                "init_std": 0.1,
                "vocab_multiple": 64,
                "max_sequence_length": 9000,
            },
            {},
            [],
        ),
        ({"vocab_size": None}, {}, ["/model/vocab_size"]),
        (
            {},
            {"norm_eps": 1e-6, "rope_theta": 5e5},
            ["/model/norm_eps", "/model/rope_theta"],
        ),
        ({"rope_theta": 1e6}, {"rope_theta": 5e5}, []),
        ({"num_layers": 2}, {}, ["/model/num_layers"]),
        ({}, {"sliding_window": 8}, ["/model/sliding_window"]),
        ({"sliding_window": 8}, {}, []),
        (
            {},
            {"moe": {"num_experts": 4}},
            ["/model/moe/num_experts", "/model/ffn_hidden_size"],
        ),
        (
            {"moe": {"num_experts": 4, "aux_loss_coeff": 0.1}},
            {"moe": {"num_experts": 4}},
            [],
        ),
        (
            {"moe": {"num_experts": 4, "top_k": 1}},
            {"moe": {"num_experts": 4}},
            ["/model/moe/top_k"],
        ),
        ({}, {"qkv_bias": True}, ["/model/qkv_bias"]),
        (
            {"linear_bias": True},
            {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True},
            [],
        ),
        ({"linear_bias": True}, {"qkv_bias": True, "mlp_bias": True}, [OUTPUT_BIAS]),
        (
            {},
            {"mla": {}},
            ["/model/num_query_groups", "/model/head_dim", "/model/mla/kv_lora_rank"],
        ),
        ({"mla": {"norm_eps": 1e-5}}, {"mla": {}}, ["/model/mla/norm_eps"]),
        ({"mtp": {}}, {}, ["/model/mtp"]),
        ({}, {"mtp": {}}, []),
    ],
)
def test_a_run_that_contradicts_its_weights(
    run: dict[str, Any], weights: dict[str, Any], pointers: list[str]
) -> None:
    problems = contradictions(
        ModelConfig.model_validate(BASE | run), ModelConfig.model_validate(BASE | weights)
    )
    assert [problem.pointer for problem in problems] == pointers
    assert all(
        "contradicts the weights of checkpoint.start_from" in problem.detail
        for problem in problems
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_published(name: str) -> None:
    values, parameters = PUBLISHED[name]
    assert sum(prod(shape) for shape in logical_shapes(read(values)).values()) == parameters


@pytest.mark.parametrize("base_hidden_size", [32, 48, 96])
def test_a_mup_model_is_exported_with_its_factors(base_hidden_size: int) -> None:
    model = ModelConfig.model_validate(
        {
            "num_layers": 3,
            "hidden_size": 288,
            "num_attention_heads": 4,
            "vocab_size": 260,
            "logit_scale": 1.3,
            "attention_scale": 0.1,
            "mup": {"base_hidden_size": base_hidden_size, "base_num_layers": 2},
        }
    )
    family = family_for(model)
    assert family is FAMILIES["granite"]
    again = read_model(family, family.write(model), "here")
    assert again.mup is None
    assert again.residual_factor == model.residual_factor == pytest.approx(2 / 3)
    assert again.logit_factor == pytest.approx(model.logit_factor, rel=1e-15)
    assert again.score_factor == model.score_factor
    assert contradictions(model, again) == []


def test_logits_are_not_divided_by_zero() -> None:
    values = {**LLAMA, "model_type": "granite", "logits_scaling": 0}
    values["architectures"] = ["GraniteForCausalLM"]
    with pytest.raises(ConfigError, match="logits_scaling is 0, more than 0 is needed"):
        read(values)
