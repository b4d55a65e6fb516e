"""Who gets which token, with what weight, and what keeps experts balanced.

Owns: the router's maths after its logits, all in fp32.

Formulas are Megatron-LM's. Must not know: ranks, groups, where experts are.

Shapes: T tokens, E experts, K experts of a token, N sequences.
"""

from math import ceil

import torch
from torch import Tensor

from megatron_ray.config.moe import MoEConfig

_TINY = 1e-20
"""Keeps a sum of sigmoids that are all zero from dividing by it."""


def choose(
    moe: MoEConfig,
    logits_TE: Tensor,
    bias_E: Tensor | None = None,
    given_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(experts [T, K], weights [T, K]).

    A bias counts for the choice, not for the weight; `given` experts are taken as they
    are.
    """
    over_chosen = moe.score_function == "softmax" and not moe.pre_softmax
    scores = logits_TE
    if not over_chosen:
        scores = (
            logits_TE.softmax(-1)
            if moe.score_function == "softmax"
            else logits_TE.sigmoid()
        )
    ranking = scores.detach() if bias_E is None else scores.detach() + bias_E
    experts = _best(moe, ranking) if given_TK is None else given_TK
    weights = scores.gather(1, experts)
    if over_chosen:
        weights = weights.softmax(-1)
    elif moe.score_function == "sigmoid" and moe.top_k > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
    return experts, weights * moe.scaling_factor if moe.scaling_factor != 1.0 else weights


def _best(moe: MoEConfig, ranking_TE: Tensor) -> Tensor:
    if moe.num_groups is not None and moe.group_top_k is not None:
        by_group = ranking_TE.view(len(ranking_TE), moe.num_groups, -1)
        of_group = by_group.topk(moe.top_k // moe.group_top_k, -1).values.sum(-1)
        best = of_group.topk(moe.group_top_k, -1).indices
        outside = torch.ones_like(of_group, dtype=torch.bool).scatter_(1, best, False)
        ranking_TE = by_group.masked_fill(outside[:, :, None], -torch.inf).flatten(1)
    return ranking_TE.topk(moe.top_k, -1).indices


def capacity(moe: MoEConfig, num_tokens: int) -> int | None:
    """Rows that an expert takes of `num_tokens` tokens; None where there is no limit."""
    if moe.capacity_factor is None:
        return None
    return min(
        num_tokens, ceil(num_tokens * moe.top_k / moe.num_experts * moe.capacity_factor)
    )


def limit(
    moe: MoEConfig, experts_TK: Tensor, weights_TK: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """The choice with at most `most` tokens per expert: who has to go gets expert E,
    which is none, and weight 0.
    """
    flat = experts_TK.flatten()
    order = torch.arange(len(flat), device=flat.device)
    if moe.drop_policy == "probs":
        order = torch.argsort(weights_TK.detach().flatten(), descending=True, stable=True)
    order = order[torch.argsort(flat[order], stable=True)]
    in_order = flat[order]
    starts = torch.searchsorted(in_order, torch.arange(moe.num_experts, device=flat.device))
    late = torch.arange(len(flat), device=flat.device) - starts[in_order] >= most
    dropped = torch.empty_like(late).index_copy_(0, order, late).view(experts_TK.shape)
    return experts_TK.masked_fill(dropped, moe.num_experts), weights_TK.masked_fill(
        dropped, 0.0
    )


def count_tokens(
    experts_TK: Tensor, num_experts: int, sequence_T: Tensor, num_sequences: int
) -> Tensor:
    """How many tokens of each sequence chose each expert: [N, E], fp32."""
    which = (sequence_T[:, None] * num_experts + experts_TK).flatten()
    counts = torch.zeros(num_sequences * num_experts, device=which.device)
    return counts.scatter_add_(0, which, torch.ones_like(which, dtype=counts.dtype)).view(
        num_sequences, num_experts
    )


def aux_loss(
    moe: MoEConfig, logits_TE: Tensor, tokens_NE: Tensor, sequence_T: Tensor
) -> Tensor:
    """These tokens' part of T x the balancing loss, T being the tokens of the whole
    microbatch, whoever holds them.

    Switch Transformer's E x coeff / (K T^2) x sum over experts of probabilities_e x
    tokens_e, over all tokens together or over each sequence with the mean over
    sequences. `tokens` are of the whole microbatch, [1, E] or [N, E]; they have no
    gradient.
    """
    probabilities = logits_TE.softmax(-1)
    if moe.score_function == "sigmoid":
        probabilities = logits_TE.sigmoid()
        probabilities = probabilities / (probabilities.sum(-1, keepdim=True) + _TINY)
    # Of tokens_e / (K T) the sum over experts is one, whatever was chosen: shares need
    # no number of tokens from anybody.
    shares = tokens_NE / tokens_NE.sum(-1, keepdim=True)
    of_token = shares if len(shares) == 1 else shares[sequence_T]
    return (probabilities * of_token).sum() * (moe.num_experts * moe.aux_loss_coeff)


def z_loss(moe: MoEConfig, logits_TE: Tensor) -> Tensor:
    """These tokens' part of T x ST-MoE's coeff x mean(logsumexp(logits)^2)."""
    return logits_TE.logsumexp(-1).square().sum() * moe.z_loss_coeff
