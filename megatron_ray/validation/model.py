"""Rules of a model's parts among themselves.

Owns: which of them need which others. Pure. Must not know: ranks, experts, data.
"""

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig


def parts(config: TrainConfig) -> list[Problem]:
    """Positions, windows and norms."""
    model = config.model
    found = list[Problem]()
    if model.full_attention_every is not None and model.sliding_window is None:
        text = (
            f"full_attention_every={model.full_attention_every} says which layers are without "
            "a window, and there is no sliding_window"
        )
        found.append(
            Problem(
                "/model/full_attention_every",
                "needs_window",
                text + "; give one, or leave it out",
            )
        )
    if model.zero_centered_norm and model.norm != "rmsnorm":
        text = (
            f"zero_centered_norm goes with norm=rmsnorm, not {model.norm}; leave it out, or "
            "change norm"
        )
        found.append(Problem("/model/zero_centered_norm", "zero_centered_norm", text))
    return found + _rope_scaling(model)


def _rope_scaling(model: ModelConfig) -> list[Problem]:
    scaling = model.rope_scaling
    pointer = "/model/rope_scaling"
    if scaling is None:
        return []
    if model.position_embedding != "rope":
        text = (
            "rope_scaling stretches rotary positions, and "
            f"position_embedding={model.position_embedding} has none; leave it out"
        )
        return [Problem(pointer, "needs_rope", text)]
    if scaling.kind == "linear":
        return []
    lower, upper = (
        ("low_freq_factor", "high_freq_factor")
        if scaling.kind == "llama3"
        else ("beta_slow", "beta_fast")
    )
    low = getattr(scaling, lower)
    high = getattr(scaling, upper)
    if low < high:
        return []
    text = (
        f"{upper}={high:g} must be above {lower}={low:g}: between them frequencies pass from "
        "kept to divided; raise it"
    )
    return [Problem(f"{pointer}/{upper}", "rope_scaling", text)]
