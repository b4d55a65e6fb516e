"""Computes the attention of one rectangle of queries and keys by a fused kernel.

Owns: the choice of the device's kernel and its type. Must not know: how sequences are
split, autograd.

Unlike torch's own function it returns the log-sum-exp of the scores, by which partial
results are merged, and it saves nothing for a backward pass.

Shapes: B batch, N query heads, G key/value heads, Q queries, K keys, D head width.
"""

import torch
from torch import Tensor


def forward(
    q_BNQD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    causal: bool,
    bias: Tensor | None,
    *,
    in_fp32: bool,
) -> tuple[Tensor, Tensor]:
    """Returns (output [B, N, Q, D], fp32 log-sum-exp [B, N, Q]).

    `causal` is for a square; `bias` [B or 1, N or 1, Q, K] is added to the scores. With
    `in_fp32`, bf16 inputs are computed in fp32 and the output is fp32. Cases without a
    fused kernel use matrix products.
    """
    q = q_BNQD
    k = for_each_query_head(k_BGKD, q_BNQD)
    v = for_each_query_head(v_BGKD, q_BNQD)
    if in_fp32:
        return _forward(q.float(), k.float(), v.float(), causal, _to_fp32(bias))
    return _forward(q, k, v, causal, bias)


def backward(
    grad: Tensor,
    q_BNQD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    final: tuple[Tensor, Tensor],
    causal: bool,
    bias: Tensor | None,
    *,
    in_fp32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v.

    `final` is the output and its log-sum-exp. With `in_fp32`, bf16 inputs are computed
    in fp32 and the gradients are fp32.
    """
    output, lse = final
    q = q_BNQD
    k = for_each_query_head(k_BGKD, q_BNQD)
    v = for_each_query_head(v_BGKD, q_BNQD)
    if in_fp32:
        grad = grad.float()
        q = q.float()
        k = k.float()
        v = v.float()
        output = output.float()
        bias = _to_fp32(bias)
    grad_q, grad_k, grad_v = _backward(grad, q, k, v, output, lse, causal, bias)
    # Heads that share keys have separate gradients for them.
    groups = k_BGKD.shape[1]
    return grad_q, _sum_over_sharers(grad_k, groups), _sum_over_sharers(grad_v, groups)


def band(
    queries: int, keys: int, distance: int, window: int, device: torch.device
) -> Tensor:
    """Returns bool [Q, K], True where a query attends to a key.

    Query i is `distance` + i - j tokens after key j, and attends to it if that is 0 to
    `window` - 1.
    """
    everything = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return everything.tril_(distance).triu_(distance - window + 1)


def band_bias(queries: int, keys: int, distance: int, window: int, like: Tensor) -> Tensor:
    """Returns `band` as 0 or -inf to be added to scores, [1, 1, Q, K], typed as `like`."""
    is_seen = band(queries, keys, distance, window, like.device)
    bias = torch.zeros(is_seen.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill_(~is_seen, -torch.inf)[None, None]


def tokens_first(output_BNQD: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the same [B, N, Q, D] in `dtype`, in memory [B, Q, N, D].

    The output projection reads this layout.
    """
    output_BQND = output_BNQD.transpose(1, 2)
    copy = torch.empty(output_BQND.shape, dtype=dtype, device=output_BQND.device)
    return copy.copy_(output_BQND).transpose(1, 2)


def for_each_query_head(x_BGKD: Tensor, q_BNQD: Tensor) -> Tensor:
    """Repeats each key/value head for every query head that shares it."""
    repeats = q_BNQD.shape[1] // x_BGKD.shape[1]
    if repeats == 1:
        return x_BGKD
    return x_BGKD.repeat_interleave(repeats, dim=1)


def _sum_over_sharers(grad_BNKD: Tensor, groups: int) -> Tensor:
    """Returns [B, G, K, D], undoing `for_each_query_head`."""
    if grad_BNKD.shape[1] == groups:
        return grad_BNKD
    return grad_BNKD.view(len(grad_BNKD), groups, -1, *grad_BNKD.shape[2:]).sum(2)


def _uses_flash(q: Tensor, bias: Tensor | None) -> bool:
    """Returns whether CUDA's flash attention supports the case."""
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    return q.device.type == "cuda" and bias is None and is_half


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Computes `forward` for as many key/value heads as query heads."""
    # CUDA's flash attention supports no bias; other cases use matrix products below.
    if _uses_flash(q, bias):
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal
        )
        return output, lse
    if q.device.type != "cuda":
        is_causal = causal and bias is None
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=bias
        )
        return output, lse
    scores = _scores(q, k, causal, bias)
    lse = scores.logsumexp(-1)
    # For a query without keys both are -inf and their difference is NaN.
    p: Tensor = (scores - lse[..., None]).nan_to_num_(nan=-torch.inf).exp_()
    return torch.matmul(p.to(v.dtype), v), lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    causal: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `backward` for as many key/value heads as query heads."""
    if _uses_flash(q, bias):
        return _flash_backward(grad, q, k, v, output, lse, causal)
    if q.device.type != "cuda":
        is_causal = causal and bias is None
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            grad, q, k, v, output, lse, 0.0, is_causal, attn_mask=bias
        )
    p = (_scores(q, k, causal, bias) - lse[..., None]).exp_()
    grad = grad.to(p.dtype)
    grad_p = torch.matmul(grad, v.to(p.dtype).mT)
    # Softmax's gradient is p x (grad_p - sum over keys of p x grad_p). That sum equals the
    # sum over the head's width of grad x output.
    row_sums = (grad * output).sum(-1, keepdim=True)
    grad_s = p * (grad_p - row_sums) * q.shape[-1] ** -0.5
    return (
        torch.matmul(grad_s, k.to(p.dtype)),
        torch.matmul(grad_s.mT, q.to(p.dtype)),
        torch.matmul(p.mT, grad),
    )


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # Lengths are read only for packed batches, and the seed only with dropout.
    lengths = q.new_zeros(0, dtype=torch.int32)
    seed = q.new_zeros(2, dtype=torch.uint64)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
        grad,
        q,
        k,
        v,
        output,
        lse.contiguous(),
        lengths,
        lengths,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        seed,
        seed[:0],
    )


def _to_fp32(bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    return bias.float()


def _scores(q: Tensor, k: Tensor, causal: bool, bias: Tensor | None) -> Tensor:
    """Returns fp32 scores [B, N, Q, K], with the bias or causal mask applied.

    Used on CUDA if no fused kernel supports the case: fp32, or a bias.
    """
    scores: Tensor = torch.matmul(q.float(), k.float().mT) * q.shape[-1] ** -0.5
    if bias is not None:
        return scores.add_(bias)
    # The fused kernels apply the causal mask themselves.
    if not causal:
        return scores
    is_future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill_(is_future, -torch.inf)
