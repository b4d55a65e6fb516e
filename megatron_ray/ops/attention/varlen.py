"""Computes causal attention within the documents of packed rows, all of them in one call.

Owns: how rows are passed to torch's kernel for sequences of different lengths. Must not
know: ranks, where documents begin.

Shapes: B batch, S sequence, T = B x S tokens, N query heads, G key/value heads, D head
width.
"""

from torch import Tensor


def varlen_attention(
    q_BNSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    window: int | None,
) -> Tensor:
    """Returns [B, N, S, D], in memory [B, S, N, D], which the output projection reads.

    `cu_seqlens` are as in `Packed`, and `longest` the tokens of the longest document.
    `window`: tokens that a token attends to, itself included; None for all before it.
    """
    # It imports the compiler, which takes seconds.
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, length, width = q_BNSD.shape
    # Tokens before a token, and after it; -1 are all.
    span = (-1, 0)
    if window is not None:
        span = (window - 1, 0)
    attended_TND = varlen_attn(
        _by_token(q_BNSD),
        _by_token(k_BGSD),
        _by_token(v_BGSD),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        window_size=span,
        enable_gqa=heads != k_BGSD.shape[1],
    )
    assert isinstance(attended_TND, Tensor)
    return attended_TND.view(batch, length, heads, width).transpose(1, 2)


def _by_token(x_BNSD: Tensor) -> Tensor:
    """Returns [T, N, D]: the rows of all samples, one after another."""
    return x_BNSD.transpose(1, 2).flatten(0, 1)
