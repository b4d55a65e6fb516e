"""Routes tokens to experts, with weights, and computes balancing losses.

Owns: the router's maths after its logits, all in fp32. Must not know: ranks, groups,
the placement of experts.

Formulas are Megatron-LM's.

Shapes: T tokens, E experts, K experts of a token, N sequences.
"""

from math import ceil

import torch
from torch import Tensor

from megatron_ray.config.architecture.moe import MoEConfig

_EPSILON = 1e-20
"""Avoids division by zero if all sigmoids are zero."""


def choose(
    moe: MoEConfig,
    logits_TE: Tensor,
    bias_E: Tensor | None = None,
    replayed_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (experts [T, K], weights [T, K]).

    A bias changes the choice, not the weights. `replayed_TK` replaces the choice.
    """
    # By default softmax covers the chosen logits only (Mixtral), so experts are ranked by
    # logits.
    softmax_over_chosen = moe.score_function == "softmax" and not moe.pre_softmax
    if softmax_over_chosen:
        scores = logits_TE
    elif moe.score_function == "softmax":
        scores = logits_TE.softmax(-1)
    else:
        scores = logits_TE.sigmoid()

    if replayed_TK is not None:
        experts = replayed_TK
    else:
        # The ranking has no gradient; the weights have one, through their scores.
        ranking = scores.detach()
        if bias_E is not None:
            ranking = ranking + bias_E
        experts = _top_experts(moe, ranking)

    weights = scores.gather(1, experts)
    if softmax_over_chosen:
        weights = weights.softmax(-1)
    elif moe.score_function == "sigmoid" and moe.top_k > 1:
        # With one expert the weight would always be 1, without a gradient for the router.
        weights = weights / (weights.sum(-1, keepdim=True) + _EPSILON)
    if moe.scaling_factor != 1.0:
        weights = weights * moe.scaling_factor
    return experts, weights


def _top_experts(moe: MoEConfig, ranking_TE: Tensor) -> Tensor:
    """Returns each token's K best experts, [T, K], from its best groups if limited."""
    if moe.num_groups is not None and moe.group_top_k is not None:
        # Group-limited routing (DeepSeek-V3): with a group per node, a token's experts are
        # on few nodes.
        by_group = ranking_TE.view(len(ranking_TE), moe.num_groups, -1)
        # A group's score is the sum of its best scores.
        group_scores = by_group.topk(moe.group_score_count, -1).values.sum(-1)
        best = group_scores.topk(moe.group_top_k, -1).indices
        is_excluded = torch.ones_like(group_scores, dtype=torch.bool)
        is_excluded.scatter_(1, best, False)
        ranking_TE = by_group.masked_fill(is_excluded[:, :, None], -torch.inf).flatten(1)
    return ranking_TE.topk(moe.top_k, -1).indices


def capacity(moe: MoEConfig, num_tokens: int) -> int | None:
    """Returns an expert's capacity for `num_tokens` tokens; None: no limit."""
    if moe.capacity_factor is None:
        return None
    # Rows per expert under even routing, times the factor; at most all tokens.
    balanced = num_tokens * moe.top_k / moe.num_experts
    return min(num_tokens, ceil(balanced * moe.capacity_factor))


def limit(
    moe: MoEConfig, experts_TK: Tensor, weights_TK: Tensor, max_rows: int
) -> tuple[Tensor, Tensor]:
    """Returns the choice with at most `max_rows` tokens per expert.

    A dropped choice becomes expert E, which means none, with weight 0.
    """
    flat = experts_TK.flatten()
    order = torch.arange(len(flat), device=flat.device)
    if moe.drop_policy == "probs":
        order = torch.argsort(weights_TK.detach().flatten(), descending=True, stable=True)
    # Stable sorts: by priority, then by expert.
    order = order[torch.argsort(flat[order], stable=True)]
    sorted_experts = flat[order]
    starts = torch.searchsorted(
        sorted_experts, torch.arange(moe.num_experts, device=flat.device)
    )
    # Position within an expert; choices from `max_rows` on are dropped.
    rank_in_expert = torch.arange(len(flat), device=flat.device) - starts[sorted_experts]
    is_over = rank_in_expert >= max_rows
    dropped = torch.empty_like(is_over).index_copy_(0, order, is_over)
    dropped_TK = dropped.view(experts_TK.shape)
    limited_experts = experts_TK.masked_fill(dropped_TK, moe.num_experts)
    return limited_experts, weights_TK.masked_fill(dropped_TK, 0.0)


def count_tokens(
    experts_TK: Tensor, num_experts: int, sequence_T: Tensor, num_sequences: int
) -> Tensor:
    """Returns how many tokens of each sequence chose each expert: [N, E], fp32."""
    # One index per (sequence, expert). scatter_add_ instead of bincount, which synchronizes
    # with the device.
    cell = (sequence_T[:, None] * num_experts + experts_TK).flatten()
    counts = torch.zeros(num_sequences * num_experts, device=cell.device)
    counts.scatter_add_(0, cell, torch.ones_like(cell, dtype=counts.dtype))
    return counts.view(num_sequences, num_experts)


def aux_loss(
    moe: MoEConfig, logits_TE: Tensor, tokens_NE: Tensor, sequence_T: Tensor
) -> Tensor:
    """Returns these tokens' part of T x the balancing loss.

    T is the number of tokens of the microbatch on all ranks. The loss is Switch
    Transformer's E x coeff / (K T^2) x sum over experts of probabilities_e x tokens_e,
    over all tokens together or over each sequence with the mean over sequences.
    `tokens_NE` covers the whole microbatch, [1, E] or [N, E], and has no gradient.
    """
    probabilities = logits_TE.softmax(-1)
    if moe.score_function == "sigmoid":
        probabilities = logits_TE.sigmoid()
        probabilities = probabilities / (probabilities.sum(-1, keepdim=True) + _EPSILON)
    # tokens_e / (K T) always sums to one over experts, so shares can be computed without K
    # T of all ranks.
    shares = tokens_NE / tokens_NE.sum(-1, keepdim=True)
    if len(shares) > 1:
        shares = shares[sequence_T]
    return (probabilities * shares).sum() * (moe.num_experts * moe.aux_loss_coeff)


def z_loss(moe: MoEConfig, logits_TE: Tensor) -> Tensor:
    """Returns these tokens' part of T x ST-MoE's coeff x mean(logsumexp(logits)^2)."""
    return logits_TE.logsumexp(-1).square().sum() * moe.z_loss_coeff
