"""Reads and writes rotary positions in config.json.

There are two spellings: `rope_theta` beside `rope_scaling`, or `rope_parameters` with
both. Pure. Must not know: families.
"""

from math import isclose, log
from typing import Any

from megatron_ray.checkpoint.hf.hf_config import HfConfig
from megatron_ray.config.architecture.positions import RopeScaling
from megatron_ray.config.model import ModelConfig

_FACTORS = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow"),
    "linear": (),
}


def read_rope(config: HfConfig, theta: float = 10000.0) -> dict[str, Any]:
    """Reads rope_theta and rope_scaling; `theta` is the family's default base."""
    values = config.get("rope_parameters", {}) or config.get("rope_scaling", {})
    # Models with several kinds of layers have a group of parameters for each kind.
    is_flat = isinstance(values, dict) and not _has_groups(values)
    if not is_flat:
        raise config.error(
            "rope_parameters differ between kinds of layers, which is not supported"
        )
    rope = HfConfig(values, f"{config.where}: rope_parameters")
    rope.one_of("partial_rotary_factor", (1, 1.0), config.get("partial_rotary_factor", 1.0))
    # Older files have `type`.
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields: dict[str, Any] = {
        "rope_theta": rope.number("rope_theta", config.number("rope_theta", theta))
    }
    if kind == "default":
        return fields
    if kind not in _FACTORS:
        raise rope.error(
            f"rope_type={kind!r} is not supported; known: 'default', "
            f"{', '.join(map(repr, _FACTORS))}"
        )
    scaling = {"kind": kind, "factor": float(rope.number("factor"))}
    for name in _FACTORS[kind]:
        if rope.get(name) is not None:
            scaling[name] = float(rope.number(name))
    # The original length is next to the parameters, or is the length of the model.
    if kind != "linear":
        length = config.number(
            "original_max_position_embeddings",
            config.number("max_position_embeddings", 2048),
        )
        scaling["original_max_position_embeddings"] = rope.number(
            "original_max_position_embeddings", length
        )
    if kind == "yarn":
        scaling |= _read_yarn(rope)
    return fields | {"rope_scaling": scaling}


def _has_groups(values: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in values.values())


def _read_yarn(rope: HfConfig) -> dict[str, Any]:
    """Reads the factors by which cos, sin and attention scores are multiplied."""
    rope.one_of("truncate", (True,), True)
    factor = float(rope.number("factor", 0))
    mscale = float(rope.number("mscale", 0))
    mscale_all_dim = float(rope.number("mscale_all_dim", 0))
    if mscale_all_dim and not mscale:
        raise rope.error("mscale_all_dim without mscale is not supported")
    # Transformers uses the two numbers only where neither is zero.
    if not mscale_all_dim:
        mscale = 1.0
    # An explicit attention_factor would override the implied one, which RopeScaling cannot
    # express.
    implied = _multiplier(factor, mscale) / _multiplier(factor, mscale_all_dim)
    attention_factor = rope.number("attention_factor", implied)
    if not isclose(attention_factor, implied, rel_tol=1e-6):
        raise rope.error(
            f"attention_factor={attention_factor} is not supported; it must be the "
            f"{implied:g} that factor and mscale imply"
        )
    return {"mscale": mscale, "mscale_all_dim": mscale_all_dim}


def _multiplier(factor: float, mscale: float) -> float:
    """Returns m(mscale) of RopeScaling.mscale."""
    if factor <= 1:
        return 1.0
    return 0.1 * mscale * log(factor) + 1.0


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """Writes the older spelling, which all versions of transformers can read."""
    values: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_scaling": None}
    if model.rope_scaling is not None:
        values["rope_scaling"] = _write_scaling(model.rope_scaling)
    return values


def _write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    for name in _FACTORS[scaling.kind]:
        fields[name] = getattr(scaling, name)
    if scaling.kind != "linear":
        fields["original_max_position_embeddings"] = (
            scaling.original_max_position_embeddings
        )
    # At 0 transformers ignores both numbers, so they are left out.
    if scaling.kind == "yarn" and scaling.mscale_all_dim:
        fields |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return fields
