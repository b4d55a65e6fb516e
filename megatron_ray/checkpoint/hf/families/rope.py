"""Rotary positions in config.json, in both spellings (`rope_theta` beside
`rope_scaling`, or `rope_parameters`). Owns: reading and writing them. Pure. Must not
know: families.
"""

from math import isclose, log
from typing import Any

from megatron_ray.checkpoint.hf.options import Options
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.positions import RopeScaling

_FACTORS = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow"),
    "linear": (),
}


def read_rope(options: Options, theta: float = 10000.0) -> dict[str, Any]:
    """Fields rope_theta and rope_scaling; `theta` is the family's own base."""
    found = options.get("rope_parameters", {}) or options.get("rope_scaling", {})
    if not isinstance(found, dict) or any(
        isinstance(value, dict) for value in found.values()
    ):
        raise options.refuse(
            "rope_parameters differ between kinds of layers, which is not supported"
        )
    rope = Options(found, f"{options.where}: rope_parameters")
    rope.only("partial_rotary_factor", (1, 1.0), options.get("partial_rotary_factor", 1.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields: dict[str, Any] = {
        "rope_theta": rope.number("rope_theta", options.number("rope_theta", theta))
    }
    if kind == "default":
        return fields
    if kind not in _FACTORS:
        raise rope.refuse(
            f"rope_type={kind!r} is not supported; known: 'default', "
            f"{', '.join(map(repr, _FACTORS))}"
        )
    scaling = {"kind": kind, "factor": float(rope.number("factor"))}
    scaling |= {
        name: float(rope.number(name))
        for name in _FACTORS[kind]
        if rope.get(name) is not None
    }
    if kind != "linear":
        length = options.number(
            "original_max_position_embeddings",
            options.number("max_position_embeddings", 2048),
        )
        scaling["original_max_position_embeddings"] = rope.number(
            "original_max_position_embeddings", length
        )
    return fields | {"rope_scaling": scaling | (_yarn(rope) if kind == "yarn" else {})}


def _yarn(rope: Options) -> dict[str, Any]:
    """How cos and sin are multiplied; transformers takes both numbers only where
    neither is zero.
    """
    rope.only("truncate", (True,), True)
    mscale, all_dim, factor = (
        float(rope.number(name, 0)) for name in ("mscale", "mscale_all_dim", "factor")
    )
    fields = {"mscale": mscale if mscale and all_dim else 1.0, "mscale_all_dim": all_dim}
    if all_dim and not mscale:
        raise rope.refuse("mscale_all_dim without mscale is not supported")
    implied = _multiplier(factor, fields["mscale"]) / _multiplier(factor, all_dim)
    given = rope.number("attention_factor", implied)
    if not isclose(given, implied, rel_tol=1e-6):
        raise rope.refuse(
            f"attention_factor={given} is not supported; it must be the {implied:g} that "
            "factor and mscale imply"
        )
    return fields


def _multiplier(factor: float, mscale: float) -> float:
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """The older spelling, which every reader knows."""
    scaling = model.rope_scaling
    return {
        "rope_theta": model.rope_theta,
        "rope_scaling": _scaling(scaling) if scaling is not None else None,
    }


def _scaling(scaling: RopeScaling) -> dict[str, Any]:
    fields = {"rope_type": scaling.kind, "factor": scaling.factor}
    fields |= {name: getattr(scaling, name) for name in _FACTORS[scaling.kind]}
    if scaling.kind != "linear":
        fields["original_max_position_embeddings"] = (
            scaling.original_max_position_embeddings
        )
    if scaling.kind == "yarn" and scaling.mscale_all_dim:
        fields |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return fields
