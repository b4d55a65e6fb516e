"""Checks that the parts of a model fit each other, and its optimizer where they must.

Pure. Must not know: ranks, experts, data.
"""

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.optimizer_kinds import optimizer_kind
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig


def model_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of windows, norms, rotary positions and muP."""
    model = config.model
    problems = []
    if model.full_attention_every is not None and model.sliding_window is None:
        detail = (
            f"full_attention_every={model.full_attention_every} exempts layers from the "
            "sliding window, and there is no sliding_window; give one, or leave it out"
        )
        problems.append(Problem("/model/full_attention_every", "needs_window", detail))
    if model.zero_centered_norm and model.norm != "rmsnorm":
        detail = (
            f"zero_centered_norm needs norm=rmsnorm, not {model.norm}; leave it out, or "
            "change norm"
        )
        problems.append(Problem("/model/zero_centered_norm", "zero_centered_norm", detail))
    return problems + _rope_scaling_problems(model) + _mup_problems(config)


def _mup_problems(config: TrainConfig) -> list[Problem]:
    name = config.optimizer.name
    if config.model.mup is None or optimizer_kind(name).is_adaptive:
        return []
    detail = (
        f"mup scales the learning rates of Adam's kind of optimizer, not those of {name}; use "
        "another optimizer.name, or leave mup out"
    )
    return [Problem("/model/mup", "mup_needs_adam", detail)]


def _rope_scaling_problems(model: ModelConfig) -> list[Problem]:
    scaling = model.rope_scaling
    pointer = "/model/rope_scaling"
    if scaling is None:
        return []
    if model.position_embedding != "rope":
        detail = (
            "rope_scaling applies to rotary positions, not to "
            f"position_embedding={model.position_embedding}; leave it out"
        )
        return [Problem(pointer, "needs_rope", detail)]
    if scaling.kind == "linear":
        return []
    if scaling.kind == "llama3":
        lower = "low_freq_factor"
        upper = "high_freq_factor"
    else:
        lower = "beta_slow"
        upper = "beta_fast"
    low = getattr(scaling, lower)
    high = getattr(scaling, upper)
    if low < high:
        return []
    detail = (
        f"{upper}={high:g} must be above {lower}={low:g}: between them frequencies change from "
        "unchanged to divided; raise it"
    )
    return [Problem(f"{pointer}/{upper}", "rope_scaling", detail)]
