"""The device's fused attention of one rectangle of queries and keys, as a forward and a
backward.

Owns: which kernel, in which type.

Unlike torch's own function it says its log-sum-exp, by which parts of one attention are
joined, and it can be asked to keep nothing. Must not know: who shares a sequence,
autograd.

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
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """Returns (output [B, N, Q, D], fp32 log-sum-exp [B, N, Q]) by the device's fused
    kernel, where it has one for the case; `causal` for a square, `bias` [B or 1, N or
    1, Q, K] added to the scores. `wide`: in fp32; the output is then wider than the
    inputs.
    """
    k = for_each_query_head(k_BGKD, q_BNQD)
    v = for_each_query_head(v_BGKD, q_BNQD)
    if wide:
        bias = bias.float() if bias is not None else None
        return _forward(q_BNQD.float(), k.float(), v.float(), causal, bias)
    return _forward(q_BNQD, k, v, causal, bias)


def backward(
    grad: Tensor,
    q_BNQD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    final: tuple[Tensor, Tensor],
    causal: bool,
    bias: Tensor | None,
    *,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v from that of the output; `final` is the
    output and its log-sum-exp. `wide`: in fp32; the gradients are then wider than the
    inputs.
    """
    output, lse = final
    groups = k_BGKD.shape[1]
    k = for_each_query_head(k_BGKD, q_BNQD)
    v = for_each_query_head(v_BGKD, q_BNQD)
    q = q_BNQD
    if wide:
        grad, q, k, v, output = (x.float() for x in (grad, q, k, v, output))
        bias = bias.float() if bias is not None else None
    grad_q, grad_k, grad_v = _backward(grad, q, k, v, output, lse, causal, bias)
    return (
        grad_q,
        _summed_over_sharers(grad_k, groups),
        _summed_over_sharers(grad_v, groups),
    )


def band(
    queries: int, keys: int, distance: int, window: int, device: torch.device
) -> Tensor:
    """Bool [Q, K], True where a key is seen: query i is `distance` + i - j tokens
    behind key j, of which 0 to `window` - 1 are in sight.
    """
    return (
        torch.ones(queries, keys, dtype=torch.bool, device=device)
        .tril_(distance)
        .triu_(distance - window + 1)
    )


def band_bias(queries: int, keys: int, distance: int, window: int, like: Tensor) -> Tensor:
    """As `band`, to be added to scores: [1, 1, Q, K], 0 or -inf, in the type of `like`."""
    seen = band(queries, keys, distance, window, like.device)
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(
        ~seen, -torch.inf
    )[None, None]


def tokens_first(output_BNQD: Tensor, dtype: torch.dtype) -> Tensor:
    """The same [B, N, Q, D] in the type of the activations and in memory [B, Q, N, D],
    as the output projection reads it.
    """
    by_token = output_BNQD.transpose(1, 2)
    return (
        torch.empty(by_token.shape, dtype=dtype, device=by_token.device)
        .copy_(by_token)
        .transpose(1, 2)
    )


def for_each_query_head(x_BGKD: Tensor, q_BNQD: Tensor) -> Tensor:
    """Each key/value head as often as query heads share it; as it is where none do."""
    repeats = q_BNQD.shape[1] // x_BGKD.shape[1]
    return x_BGKD if repeats == 1 else x_BGKD.repeat_interleave(repeats, dim=1)


def _summed_over_sharers(grad_BNKD: Tensor, groups: int) -> Tensor:
    if grad_BNKD.shape[1] == groups:
        return grad_BNKD
    return grad_BNKD.view(len(grad_BNKD), groups, -1, *grad_BNKD.shape[2:]).sum(2)


def _uses_flash(q: Tensor, bias: Tensor | None) -> bool:
    return (
        q.device.type == "cuda"
        and bias is None
        and q.dtype in (torch.float16, torch.bfloat16)
    )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As many key/value heads as query heads."""
    if _uses_flash(q, bias):
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal
        )
        return output, lse
    if q.device.type != "cuda":
        masked = causal and bias is None
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, masked, attn_mask=bias
        )
        return output, lse
    scores = _scores(q, k, causal, bias)
    lse = scores.logsumexp(-1)
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
    if _uses_flash(q, bias):
        # read only for batches without padding
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
    if q.device.type != "cuda":
        masked = causal and bias is None
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            grad, q, k, v, output, lse, 0.0, masked, attn_mask=bias
        )
    p = (_scores(q, k, causal, bias) - lse[..., None]).exp_()
    grad_p = torch.matmul(grad.to(p.dtype), v.to(p.dtype).mT)
    grad_s = (
        p
        * (grad_p - (grad.to(p.dtype) * output).sum(-1, keepdim=True))
        * q.shape[-1] ** -0.5
    )
    return (
        torch.matmul(grad_s, k.to(p.dtype)),
        torch.matmul(grad_s.mT, q.to(p.dtype)),
        torch.matmul(p.mT, grad.to(p.dtype)),
    )


def _scores(q: Tensor, k: Tensor, causal: bool, bias: Tensor | None) -> Tensor:
    """fp32 scores [B, N, Q, K], for CUDA where no fused kernel fits (fp32, or a bias)."""
    scores: Tensor = torch.matmul(q.float(), k.float().mT) * q.shape[-1] ** -0.5
    if bias is not None:
        return scores.add_(bias)
    return (
        scores.masked_fill_(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1),
            -torch.inf,
        )
        if causal
        else scores
    )
