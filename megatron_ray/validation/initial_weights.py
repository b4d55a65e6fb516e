"""Rules of a run that begins with given weights.

Owns: what of a model decides its function, and where a run contradicts its weights.

Pure. Must not know: files, formats.
"""

from math import isclose
from typing import Any

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import Problem

_TRAINING_ONLY = (
    "preset",
    "hidden_dropout",
    "attention_dropout",
    "init_std",
    "vocab_multiple",
    "full_attention_every",
)
"""Of no consequence for what given weights compute (the last one counts through the
window of each layer)."""
_MOE_TRAINING_ONLY = (
    "aux_loss_coeff",
    "aux_loss",
    "z_loss_coeff",
    "bias_update_rate",
    "capacity_factor",
    "pad_to_capacity",
    "drop_policy",
)
_STRETCHES = ("rope_theta", "rope_scaling", "sliding_window")
"""A run may change these on purpose, to learn longer sequences; at their defaults they
were more likely forgotten."""


def model_signature(model: ModelConfig) -> dict[str, Any]:
    """What decides which weights a model has and what they compute, by dotted field;
    equal for equal functions.
    """
    fields = {
        name: value
        for name, value in model.model_dump(mode="json").items()
        if name not in _TRAINING_ONLY
    }
    every_layer = range(model.num_layers)
    fields["sliding_window"] = model.sliding_window and [
        model.window_on(layer) for layer in every_layer
    ]
    fields["qkv_bias"] = model.has_qkv_bias
    if model.position_embedding != "rope":
        fields |= {"rope_theta": None, "rope_scaling": None}
    if model.mla is not None:
        fields |= {"head_dim": None, "num_query_groups": None}
    if model.mtp is not None:
        fields["mtp"] = model.mtp.num_layers
    moe = fields.pop("moe")
    width = fields.pop("ffn_hidden_size")
    if model.moe is not None:
        layers = [model.moe.on_layer(layer) for layer in every_layer]
        width = None if all(layers) else width
        moe = {
            name: value for name, value in moe.items() if name not in _MOE_TRAINING_ONLY
        } | {"layer_pattern": layers}
    return (
        fields
        | {f"moe.{name}": value for name, value in (moe or {"num_experts": None}).items()}
        | {"ffn_hidden_size": width}
    )


def contradictions(model: ModelConfig, weights: ModelConfig) -> list[Problem]:
    """Where a run's model is not the one that the weights it begins with were made for,
    in field order.

    The vocabulary must be equal; a run that leaves it out takes that of the weights
    (`with_vocabulary_of`). Longer sequences are the run's affair where positions are
    not learned, and so are rotary frequencies and windows that it sets itself.
    """
    own = model_signature(model)
    theirs = model_signature(weights)
    if (model.moe is None) != (weights.moe is None):
        own, theirs = (
            {
                name: value
                for name, value in of.items()
                if not name.startswith("moe.") or name == "moe.num_experts"
            }
            for of in (own, theirs)
        )
    defaults = model_signature(
        ModelConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=1,
        )
    )
    found = []
    for field in dict.fromkeys((*own, *theirs)):
        value = own.get(field)
        needed = theirs.get(field)
        chosen = field in _STRETCHES and value != defaults[field]
        longer = field == "max_sequence_length" and model.position_embedding != "learned"
        left_out = field == "mtp" and value is None
        if not _same(value, needed) and not (chosen or longer or left_out):
            text = (
                f"{field}={value!r} contradicts the weights of checkpoint.start_from, which "
                f"were made with {needed!r}"
            )
            found.append(
                Problem(
                    f"/model/{field.replace('.', '/')}",
                    "start_from_model",
                    f"{text}; set it to that",
                )
            )
    return found


def _same(value: Any, other: Any) -> bool:
    """Numbers may have been rounded on their way through a file."""
    return value == other or (
        isinstance(value, float)
        and isinstance(other, float)
        and isclose(value, other, rel_tol=1e-6)
    )


def with_vocabulary_of(model: ModelConfig, weights: ModelConfig) -> ModelConfig:
    """The model with the vocabulary of the weights where it has none of its own."""
    return model.model_copy(update={"vocab_size": model.vocab_size or weights.vocab_size})
