"""Makes the config.json of an export, from that of the published model if there is one.

What training has not changed stays as it was published. Torch-free. Must not know: files,
weights.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ray.checkpoint.hf.families.family import Family
from megatron_ray.checkpoint.hf.families.registry import read_model
from megatron_ray.checkpoint.hf.files import CONFIG
from megatron_ray.config.model import ModelConfig

_REPLACED = (
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
    # Weights are written without quantization, for transformers' own classes.
    "quantization_config",
    "auto_map",
    "_name_or_path",
)
"""Keys that say nothing about an export."""
_ROPE = ("rope_parameters", "rope_theta", "rope_scaling")
"""Keys of two spellings of the same values."""

Values = dict[str, Any]


def config_values(
    family: Family,
    model: ModelConfig,
    published: Mapping[str, Any],
    *,
    dtype: str,
) -> Values:
    """Returns the values of config.json, without the ids of tokens.

    `published` are those of a published model of the same family, if any.
    """
    values = family.write(model)
    if published:
        values = _changed(family, values, published)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        **values,
    }


def is_token_id(name: str) -> bool:
    """Returns whether a key holds ids of tokens, such as `eos_token_id`."""
    return name.endswith(("_token_id", "_token_ids"))


def _changed(family: Family, values: Values, published: Mapping[str, Any]) -> Values:
    """Returns the published values with those that differ for the model of now."""
    # Written from what was read, so that only changes of the model count, not spellings.
    before = family.write(read_model(family, published, CONFIG))
    changed = {}
    for name, value in values.items():
        if name not in before or before[name] != value:
            changed[name] = value
    kept = {}
    for name, value in published.items():
        if name not in _REPLACED and not is_token_id(name):
            kept[name] = value
    # A changed value must not stand beside its other spelling.
    if any(name in changed for name in _ROPE):
        for name in _ROPE:
            kept.pop(name, None)
            if name in values:
                changed[name] = values[name]
    return kept | changed
