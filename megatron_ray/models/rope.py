"""Rotary position embedding (Su et al. 2021), rotating halves as Llama does.

Owns: angles, their stretching, the rotation of a fused qkv.

Reads position ids, never an offset from a rank, so any cut of the sequence is right.
Must not know: parallelism.

Shapes: B batch, S sequence, N query heads, G key/value heads, D head width (all as held
on this rank).
"""

from math import ceil, floor, log, pi
from typing import Any

import torch
from torch import Tensor

from megatron_ray.config.positions import RopeScaling
from megatron_ray.ops.differentiable_op import DifferentiableOp


def rotates_in_fp32(device: str, dtype: torch.dtype) -> bool:
    """Whether the rotation widens first.

    On CPU that is faster, since bf16 arithmetic goes through fp32 anyway and whole
    heads rotate in long rows, and it rounds once. On CUDA it would move four times the
    bytes.
    """
    return device == "cpu" and dtype == torch.bfloat16


def rotary_angles(
    position_ids_BS: Tensor,
    width: int,
    theta: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """Cos and signed sin, each [B or 1, S, 1, D], for activations of type `dtype`;
    computed in fp32. `width` D is what is rotated.

    Rotated x = x cos + (x with its halves exchanged) sin, hence the sine's first half
    is negative.
    """
    angles = position_ids_BS[:, :, None, None].float() * inverse_frequencies(
        width, theta, scaling, position_ids_BS.device
    )
    if rotates_in_fp32(position_ids_BS.device.type, dtype):
        dtype = torch.float32
    cos = angles.cos()
    sin = angles.sin()
    longer = concentration(scaling)
    if longer != 1.0:
        cos = cos * longer
        sin = sin * longer
    cos = cos.to(dtype)
    sin = sin.to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def inverse_frequencies(
    width: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> Tensor:
    """Radians per position of each pair of a rotated width: fp32 [width / 2], theta^(-2
    i / width), stretched as `scaling` says.
    """
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    plain = 1.0 / theta**exponents
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        kept = torch.zeros_like(plain)
    elif scaling.kind == "llama3":
        # Rotations over the original length: as many as high_freq_factor stay, as few
        # as low_freq_factor are divided by the factor.
        rotations = scaling.original_max_position_embeddings / (2 * pi) * plain
        kept = (rotations - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
    else:
        first, last = _yarn_ramp(width, theta, scaling)
        kept = 1 - (
            torch.arange(width // 2, device=device, dtype=torch.float32) - first
        ) / (last - first)
    kept = kept.clamp(0, 1)
    return plain * kept + plain / scaling.factor * (1 - kept)


def _yarn_ramp(width: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """Pairs from which YaRN (Peng et al. 2023, section 3.2) begins and ends to divide:
    those that rotate beta_fast and beta_slow times.
    """

    def pair(rotations: float) -> float:
        return (
            width
            * log(scaling.original_max_position_embeddings / (rotations * 2 * pi))
            / (2 * log(theta))
        )

    first = max(floor(pair(scaling.beta_fast)), 0)
    last = min(ceil(pair(scaling.beta_slow)), width - 1)
    return first, last if last != first else last + 0.001


def concentration(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by, so that attention is sharper over longer
    sequences: only YaRN's is not 1.
    """
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return yarn_magnitude(scaling.factor, scaling.mscale) / yarn_magnitude(
        scaling.factor, scaling.mscale_all_dim
    )


def yarn_magnitude(factor: float, weight: float) -> float:
    """0.1 x weight x ln(factor) + 1: how much larger queries and keys together grow
    with the sequence.
    """
    return 0.1 * weight * log(factor) + 1


def _rotate_into(
    out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, direction: float
) -> None:
    """Out = x rotated by direction x angle, without temporaries; shapes [B, S, heads,
    D].
    """
    half = x.shape[-1] // 2
    cos = cos[..., half:]
    sin = sin[..., half:]
    x1 = x[..., :half]
    x2 = x[..., half:]
    out1 = out[..., :half]
    out2 = out[..., half:]
    torch.mul(x1, cos, out=out1)
    out1.addcmul_(x2, sin, value=-direction)
    torch.mul(x2, cos, out=out2)
    out2.addcmul_(x1, sin, value=direction)


def _rotated_wide(x_BNSD: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """X rotated, fp32 and contiguous [B, heads, S, D]: a head's positions lie together,
    so rows of S x D run against the angles.
    """
    half = x_BNSD.shape[-1] // 2
    wide = torch.empty(x_BNSD.shape, dtype=torch.float32, device=x_BNSD.device).copy_(
        x_BNSD
    )
    exchanged = torch.empty_like(wide)
    exchanged[..., :half] = wide[..., half:]
    exchanged[..., half:] = wide[..., :half]
    return wide.mul_(cos.transpose(1, 2)).addcmul_(
        exchanged, sin.transpose(1, 2), value=direction
    )


def _rotate_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, head_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q, rotated k and v, as RotateQKV returns them."""
    q, k, v = _split(qkv, heads, groups, head_width)
    if rotates_in_fp32(qkv.device.type, qkv.dtype):
        wide_q, wide_k = (_rotated_wide(x.transpose(1, 2), cos, sin, 1.0) for x in (q, k))
        return (
            wide_q.to(qkv.dtype),
            wide_k.to(qkv.dtype),
            v.transpose(1, 2).clone(memory_format=torch.contiguous_format),
        )
    rotated_q = q.new_empty(q.shape)
    rotated_k = k.new_empty(k.shape)
    _rotate_into(rotated_q, q, cos, sin, 1.0)
    _rotate_into(rotated_k, k, cos, sin, 1.0)
    # A copy of v, so that the whole of qkv need not be kept for the backward.
    return rotated_q.transpose(1, 2), rotated_k.transpose(1, 2), v.clone().transpose(1, 2)


def _rotate_qkv_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Gradient of the fused [B, S, (N + 2 G) D]."""
    (batch, heads, sequence, head_width) = grad_q.shape
    groups = grad_k.shape[1]
    grad = grad_q.new_empty(batch, sequence, (heads + 2 * groups) * head_width)
    q, k, v = _split(grad, heads, groups, head_width)
    for part, rotated in ((q, grad_q), (k, grad_k)):
        if rotates_in_fp32(grad.device.type, grad.dtype):
            part.copy_(_rotated_wide(rotated, cos, sin, -1.0).transpose(1, 2))
        else:
            _rotate_into(part, rotated.transpose(1, 2), cos, sin, -1.0)
    v.copy_(grad_v.transpose(1, 2))
    return grad


ROTATION = DifferentiableOp(_rotate_qkv, _rotate_qkv_backward)


class RotateQKV(torch.autograd.Function):
    """Splits a fused [B, S, (N + 2 G) D] into rotated q [B, N, S, D], rotated k [B, G,
    S, D] and v [B, G, S, D].

    One function, so that the backward writes the three gradients straight into one
    fused buffer instead of concatenating. In memory tokens come first, as fused
    attention likes it; where rotation is in fp32, heads do, as batched products do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        sizes: tuple[int, int, int],
        kernel: DifferentiableOp,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`sizes`: N, G, D."""
        ctx.save_for_backward(cos, sin)
        ctx.kernel = kernel
        return kernel.forward(qkv, cos, sin, *sizes)  # type: ignore[no-any-return]

    @staticmethod
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return ctx.kernel.backward(grad_q, grad_k, grad_v, cos, sin), None, None, None, None


def _split(
    qkv: Tensor, heads: int, groups: int, head_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, S, heads, D] of the three parts."""
    split = qkv.view(*qkv.shape[:-1], heads + 2 * groups, head_width)
    q, k, v = torch.split(split, [heads, groups, groups], dim=2)
    return q, k, v


def split_qkv(
    qkv: Tensor, heads: int, groups: int, head_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The three parts [B, heads, S, D] unrotated, for models without rotary positions."""
    q, k, v = _split(qkv, heads, groups, head_width)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
