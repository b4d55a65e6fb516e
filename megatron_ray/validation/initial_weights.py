"""Checks that the model of a run fits the weights that it starts from.

Owns: the fields of a model that determine the function of its weights.

Pure. Must not know: files, formats.
"""

from math import isclose
from typing import Any

from megatron_ray.config.architecture.latent import LatentAttentionConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import Problem

_TRAINING_ONLY = (
    "preset",
    "hidden_dropout",
    "attention_dropout",
    "init_std",
    "vocab_multiple",
    "full_attention_every",
    "spec",
)
"""Fields that do not affect the function of given weights. full_attention_every is
among them because the signature contains the window of every layer instead."""
_MOE_TRAINING_ONLY = (
    "aux_loss_coeff",
    "aux_loss",
    "z_loss_coeff",
    "bias_update_rate",
    "capacity_factor",
    "pad_to_capacity",
    "drop_policy",
)
_FIRST_FIELDS = {"moe": "num_experts", "mla": "kv_lora_rank"}
"""Groups of fields, each with the one that is None in the signature of a model without
the group."""
_LONG_CONTEXT_FIELDS = ("rope_theta", "rope_scaling", "sliding_window")
"""Fields that a run may change intentionally, to train on longer sequences. Default
values were more likely forgotten."""


def model_signature(model: ModelConfig) -> dict[str, Any]:
    """Returns the values that determine a model's weights and their function.

    Keys are dotted field names. Two models that compute the same function have equal
    signatures, however their configs are written.
    """
    fields = model.model_dump(mode="json")
    for name in _TRAINING_ONLY:
        del fields[name]
    if model.sliding_window is not None:
        fields["sliding_window"] = [
            model.window_on(layer) for layer in range(model.num_layers)
        ]
    # muP acts on the function by these two only.
    del fields["mup"]
    fields["residual_scale"] = model.residual_factor
    # Files have its inverse, whose own inverse may differ in the last bit.
    fields["logit_scale"] = float(f"{model.logit_factor:.12g}")
    # The default, spelled out or not.
    fields["attention_scale"] = None
    if not isclose(model.score_factor, 1, rel_tol=1e-12):
        fields["attention_scale"] = model.attention_scale
    # linear_bias implies all of them.
    del fields["linear_bias"]
    fields["qkv_bias"] = model.has_qkv_bias
    fields["attention_output_bias"] = model.has_attention_output_bias
    fields["mlp_bias"] = model.has_mlp_bias
    # Fields without effect get one value, whatever they were set to.
    if model.position_embedding != "rope":
        fields["rope_theta"] = None
        fields["rope_scaling"] = None
    if model.mla is not None:
        fields["head_dim"] = None
        fields["num_query_groups"] = None
    # The weight of its loss only affects training.
    if model.mtp is not None:
        fields["mtp"] = model.mtp.num_layers
    ffn_width = fields.pop("ffn_hidden_size")
    if all(model.experts_on(layer) is not None for layer in range(model.num_layers)):
        ffn_width = None  # no layer has a plain MLP
    for group, values in (("moe", _moe_signature(model)), ("mla", _mla_signature(model))):
        del fields[group]
        for name, value in values.items():
            fields[f"{group}.{name}"] = value
    fields["ffn_hidden_size"] = ffn_width
    return fields


def _moe_signature(model: ModelConfig) -> dict[str, Any]:
    if model.moe is None:
        return {"num_experts": None}
    fields = model.moe.model_dump(mode="json")
    for name in _MOE_TRAINING_ONLY:
        del fields[name]
    fields["layer_pattern"] = [
        model.moe.on_layer(layer) for layer in range(model.num_layers)
    ]
    # Without groups nothing is ranked.
    if model.moe.num_groups is not None:
        fields["scores_per_group"] = model.moe.group_score_count
    return fields


def _mla_signature(model: ModelConfig) -> dict[str, Any]:
    if model.mla is None:
        return {"kv_lora_rank": None}
    return model.mla.model_dump(mode="json")


def contradictions(model: ModelConfig, weights: ModelConfig) -> list[Problem]:
    """Returns contradictions between a run's model and that of its initial weights.

    The vocabulary may be larger, which adds rows; a run that leaves it out takes that of
    the weights (`with_vocabulary_of`). A run may have longer sequences where positions
    are not learned, and may set rotary frequencies and windows of its own.
    """
    own = model_signature(model)
    expected = model_signature(weights)
    # One problem reports that only one of them has experts, or latent attention; the other
    # fields inside the group would only repeat it.
    for group, first in _FIRST_FIELDS.items():
        if (getattr(model, group) is None) != (getattr(weights, group) is None):
            own = _without_details(own, group, first)
            expected = _without_details(expected, group, first)
    defaults = model_signature(
        ModelConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=1,
        )
    )
    problems = []
    for field in dict.fromkeys((*own, *expected)):
        value = own.get(field)
        needed = expected.get(field)
        is_chosen = field in _LONG_CONTEXT_FIELDS and value != defaults[field]
        if is_same(value, needed) or is_chosen or _may_differ(model, field, needed):
            continue
        detail = (
            f"{field}={value!r} contradicts the weights of checkpoint.start_from, which "
            f"were made with {needed!r}; set it to that"
        )
        pointer = f"/model/{field.replace('.', '/')}"
        problems.append(Problem(pointer, "start_from_model", detail))
    return problems


def _without_details(signature: dict[str, Any], group: str, first: str) -> dict[str, Any]:
    """Returns a signature with only the first field of a group."""
    kept = {}
    for name, value in signature.items():
        if name == f"{group}.{first}" or not name.startswith(f"{group}."):
            kept[name] = value
    return kept


def _may_differ(model: ModelConfig, field: str, needed: Any) -> bool:
    if field == "max_sequence_length":
        return model.position_embedding != "learned"
    # Rows are added for further tokens.
    if field == "vocab_size" and model.vocab_size is not None and needed is not None:
        return bool(model.vocab_size > needed)
    # A run may leave out the MTP layers of its initial weights.
    return field == "mtp" and model.mtp is None


def is_same(value: Any, other: Any) -> bool:
    """Returns whether two values of a field are equal, but for rounding in a file."""
    if isinstance(value, float) and isinstance(other, float):
        return isclose(value, other, rel_tol=1e-6)
    return bool(value == other)


def with_latent_eps_of(model: ModelConfig, checkpoint: ModelConfig) -> ModelConfig:
    """Returns the model of a resumed run with the latents' eps of its checkpoint.

    Runs of earlier versions had that of all norms, which their spec does not name. An eps
    that is not the default was chosen.
    """
    if model.mla is None or checkpoint.mla is None:
        return model
    if model.mla.norm_eps != LatentAttentionConfig().norm_eps:
        return model
    mla = model.mla.model_copy(update={"norm_eps": checkpoint.mla.norm_eps})
    return model.model_copy(update={"mla": mla})


def with_vocabulary_of(model: ModelConfig, weights: ModelConfig) -> ModelConfig:
    """Returns the model with the weights' vocabulary if it has none."""
    return model.model_copy(update={"vocab_size": model.vocab_size or weights.vocab_size})
