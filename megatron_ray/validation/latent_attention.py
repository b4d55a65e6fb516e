"""Checks latent attention (MLA) and multi-token prediction (MTP).

Pure. Must not know: ranks.
"""

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig


def latent_attention_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of latent attention: what it excludes, and its head widths."""
    model = config.model
    mla = config.model.mla
    if mla is None:
        return []
    problems = _excluded_fields(model)
    if model.position_embedding != "rope":
        detail = (
            "mla needs rotary positions, not "
            f"position_embedding={model.position_embedding}; use rope"
        )
        problems.append(Problem("/model/position_embedding", "latent_attention", detail))
    # The two fields below have defaults that fit; only values of the user's own can fail.
    if model.kv_heads != model.num_attention_heads:
        detail = (
            f"mla has a key for each of the {model.num_attention_heads} query heads, so "
            f"num_query_groups={model.kv_heads} is not possible; leave it out"
        )
        problems.append(Problem("/model/num_query_groups", "latent_attention", detail))
    if model.head_width != mla.qk_head_dim:
        detail = (
            f"head_dim={model.head_width} is not qk_nope_head_dim + qk_rope_head_dim = "
            f"{mla.qk_head_dim}; leave it out"
        )
        problems.append(Problem("/model/head_dim", "latent_attention", detail))
    # Kernels take queries, keys and values of one width: narrower values are padded.
    if mla.v_head_dim > mla.qk_head_dim:
        detail = (
            f"v_head_dim={mla.v_head_dim} is wider than queries and keys ({mla.qk_head_dim}), "
            f"which no attention kernel supports; use at most {mla.qk_head_dim}"
        )
        problems.append(Problem("/model/mla/v_head_dim", "latent_attention", detail))
    return problems


def _excluded_fields(model: ModelConfig) -> list[Problem]:
    """Returns problems of fields that belong to grouped-query attention only."""
    is_set = {
        "qk_norm": model.qk_norm,
        "linear_bias": model.linear_bias,
        "sliding_window": model.sliding_window is not None,
    }
    problems = []
    for name in is_set:
        if is_set[name]:
            detail = f"{name} is not supported with mla; leave it out, or leave out mla"
            problems.append(Problem(f"/model/{name}", "latent_attention", detail))
    return problems


def mtp_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of multi-token prediction.

    MTP layers read tokens ahead of their positions, and a table of learned positions has
    no rows for those at the end of a sample.
    """
    model = config.model
    if model.mtp is None or model.position_embedding != "learned":
        return []
    detail = (
        "mtp does not support position_embedding=learned: the tokens that it reads ahead have "
        "no learned positions; use rope, or leave out mtp"
    )
    return [Problem("/model/mtp", "further_tokens", detail)]
