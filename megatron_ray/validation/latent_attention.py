"""Rules of latent attention and of layers that predict further tokens.

Owns: what they do not go with. Pure. Must not know: ranks.
"""

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig


def latent_attention(config: TrainConfig) -> list[Problem]:
    """What other attention has, or what nobody publishes, is refused."""
    model = config.model
    mla = config.model.mla
    if mla is None:
        return []
    found = [
        Problem(
            f"/model/{name}",
            "latent_attention",
            f"{name} has no meaning with mla; leave it out, or leave out mla",
        )
        for name, given in _of_other_attention(model).items()
        if given
    ]
    if model.position_embedding != "rope":
        text = (
            "mla rotates a part of each key, and "
            f"position_embedding={model.position_embedding} rotates nothing; use rope"
        )
        found.append(Problem("/model/position_embedding", "latent_attention", text))
    if model.kv_heads != model.num_attention_heads:
        text = (
            f"under mla all {model.num_attention_heads} heads have keys of their own, so "
            f"num_query_groups={model.kv_heads} cannot be"
        )
        found.append(
            Problem("/model/num_query_groups", "latent_attention", f"{text}; leave it out")
        )
    if model.head_width != mla.qk_head_dim:
        text = (
            f"head_dim={model.head_width} is not qk_nope_head_dim + qk_rope_head_dim = "
            f"{mla.qk_head_dim}; leave it out"
        )
        found.append(Problem("/model/head_dim", "latent_attention", text))
    if mla.v_head_dim > mla.qk_head_dim:
        text = (
            f"v_head_dim={mla.v_head_dim} is wider than queries and keys ({mla.qk_head_dim}), "
            "for which no kernel is here"
        )
        found.append(
            Problem(
                "/model/mla/v_head_dim",
                "latent_attention",
                f"{text}; use at most {mla.qk_head_dim}",
            )
        )
    return found


def _of_other_attention(model: ModelConfig) -> dict[str, bool]:
    return {
        "qk_norm": model.qk_norm,
        "linear_bias": model.linear_bias,
        "qkv_bias": model.qkv_bias,
        "sliding_window": model.sliding_window is not None,
    }


def further_tokens(config: TrainConfig) -> list[Problem]:
    """A table of learned positions has none for the tokens that such layers read ahead."""
    model = config.model
    if model.mtp is None or model.position_embedding != "learned":
        return []
    text = (
        "mtp reads tokens ahead of their positions, for which a table of learned positions has "
        "no rule; use rope, or leave out mtp"
    )
    return [Problem("/model/mtp", "further_tokens", text)]
