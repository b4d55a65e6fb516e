"""Defines rotary position embedding (Su et al. 2021), rotating halves as Llama.

Owns: angles, their scaling to longer sequences, the rotation of a fused qkv. Must not
know: parallelism.

Uses position ids, never a rank's offset, so any split of the sequence is correct.

Shapes (local to the rank): B batch, S sequence, N query heads, G key/value heads, D
head width.
"""

from math import ceil, floor, log, pi
from typing import Any

import torch
from torch import Tensor

from megatron_ray.config.architecture.positions import RopeScaling
from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.differentiable_op import DifferentiableOp


def rotates_in_fp32(device: str, dtype: torch.dtype) -> bool:
    """Returns whether the rotation converts its inputs to fp32 first.

    On CPU that is faster, since bf16 and fp16 arithmetic use fp32 anyway and heads rotate
    in long rows, and it rounds once. On CUDA it would need four times the memory traffic.
    """
    return device == "cpu" and dtype.itemsize < 4


def rotary_angles(
    position_ids_BS: Tensor,
    width: int,
    theta: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns cos and signed sin, each [B or 1, S, 1, D], computed in fp32.

    `width` D is the rotated width, `dtype` the type of the activations. Rotated x = x
    cos + (x with its halves exchanged) sin, hence the sine's first half is negative.
    """
    # In fp32 also for bf16, which cannot represent positions beyond 256 exactly.
    angles = position_ids_BS[:, :, None, None].float() * inverse_frequencies(
        width, theta, scaling, position_ids_BS.device
    )
    if rotates_in_fp32(position_ids_BS.device.type, dtype):
        dtype = torch.float32
    cos = angles.cos()
    sin = angles.sin()
    magnitude = concentration(scaling)
    if magnitude != 1.0:
        cos = cos * magnitude
        sin = sin * magnitude
    cos = cos.to(dtype)
    sin = sin.to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def inverse_frequencies(
    width: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> Tensor:
    """Returns radians per position of each rotated pair: fp32 [width / 2].

    Unscaled theta^(-2 i / width) for pair i. Depending on its kind, scaling divides a
    frequency by the factor, keeps it, or interpolates.
    """
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    unscaled = 1.0 / theta**exponents
    if scaling is None:
        return unscaled
    # 1 keeps a frequency, 0 divides it by the factor.
    if scaling.kind == "linear":
        unscaled_share = torch.zeros_like(unscaled)
    elif scaling.kind == "llama3":
        # By rotations over the original length: kept from high_freq_factor on, divided up
        # to low_freq_factor.
        rotations = scaling.original_max_position_embeddings / (2 * pi) * unscaled
        unscaled_share = (rotations - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
    else:
        first, last = _yarn_ramp(width, theta, scaling)
        pairs = torch.arange(width // 2, device=device, dtype=torch.float32)
        unscaled_share = 1 - (pairs - first) / (last - first)
    unscaled_share = unscaled_share.clamp(0, 1)
    return unscaled * unscaled_share + unscaled / scaling.factor * (1 - unscaled_share)


def _yarn_ramp(width: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """Returns the first and last pair of YaRN's interpolation range.

    Between them scaling changes from keeping to dividing frequencies (Peng et al. 2023,
    section 3.2). They rotate beta_fast and beta_slow times over the original length.
    """
    fast = _pair_with_rotations(scaling.beta_fast, width, theta, scaling)
    slow = _pair_with_rotations(scaling.beta_slow, width, theta, scaling)
    first = max(floor(fast), 0)
    last = min(ceil(slow), width - 1)
    if last == first:
        # Avoids division by zero, as in YaRN's published code.
        return first, last + 0.001
    return first, last


def _pair_with_rotations(
    rotations: float, width: int, theta: float, scaling: RopeScaling
) -> float:
    """Returns the fractional index of the pair with this number of rotations."""
    original_length = scaling.original_max_position_embeddings
    return width * log(original_length / (rotations * 2 * pi)) / (2 * log(theta))


def concentration(scaling: RopeScaling | None) -> float:
    """Returns the factor of cos and sin; 1 except for YaRN.

    It makes attention sharper over longer sequences.
    """
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return yarn_magnitude(scaling.factor, scaling.mscale) / yarn_magnitude(
        scaling.factor, scaling.mscale_all_dim
    )


def yarn_magnitude(factor: float, weight: float) -> float:
    """Returns YaRN's mscale, 0.1 x weight x ln(factor) + 1.

    It scales queries and keys for longer sequences.
    """
    return 0.1 * weight * log(factor) + 1


def _rotate_into(
    out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, direction: float
) -> None:
    """Writes x rotated by direction x angle to `out`, without temporaries.

    Shapes: [B, S, heads, D].
    """
    half = x.shape[-1] // 2
    # Second halves, because cos is duplicated and the sine's first half is negated.
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


def _rotate_in_fp32(x_BNSD: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """Returns x rotated, fp32 and contiguous [B, heads, S, D].

    A head's positions are contiguous, so rows of S x D elements are multiplied by the
    angles.
    """
    half = x_BNSD.shape[-1] // 2
    wide = torch.empty(x_BNSD.shape, dtype=torch.float32, device=x_BNSD.device)
    wide.copy_(x_BNSD)
    # x cos + (x with its halves exchanged) sin, in two passes over whole rows.
    exchanged = torch.empty_like(wide)
    exchanged[..., :half] = wide[..., half:]
    exchanged[..., half:] = wide[..., :half]
    rotated = wide.mul_(cos.transpose(1, 2))
    return rotated.addcmul_(exchanged, sin.transpose(1, 2), value=direction)


def _rotate_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, head_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rotated q, rotated k and v, in the shapes of `RotateQKV`."""
    q, k, v = _split(qkv, heads, groups, head_width)
    if rotates_in_fp32(qkv.device.type, qkv.dtype):
        wide_q = _rotate_in_fp32(q.transpose(1, 2), cos, sin, 1.0)
        wide_k = _rotate_in_fp32(k.transpose(1, 2), cos, sin, 1.0)
        v_BGSD = v.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return wide_q.to(qkv.dtype), wide_k.to(qkv.dtype), v_BGSD
    rotated_q = q.new_empty(q.shape)
    rotated_k = k.new_empty(k.shape)
    _rotate_into(rotated_q, q, cos, sin, 1.0)
    _rotate_into(rotated_k, k, cos, sin, 1.0)
    # Copies v, so that qkv need not be kept in memory for the backward.
    return rotated_q.transpose(1, 2), rotated_k.transpose(1, 2), v.clone().transpose(1, 2)


def _rotate_qkv_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Returns the gradient of the fused [B, S, (N + 2 G) D]."""
    batch, heads, sequence, head_width = grad_q.shape
    groups = grad_k.shape[1]
    grad = grad_q.new_empty(batch, sequence, (heads + 2 * groups) * head_width)
    q, k, v = _split(grad, heads, groups, head_width)
    # The inverse of a rotation is the rotation by the opposite angle.
    for part, grad_rotated in ((q, grad_q), (k, grad_k)):
        if rotates_in_fp32(grad.device.type, grad.dtype):
            part.copy_(_rotate_in_fp32(grad_rotated, cos, sin, -1.0).transpose(1, 2))
        else:
            _rotate_into(part, grad_rotated.transpose(1, 2), cos, sin, -1.0)
    # Values are not rotated.
    v.copy_(grad_v.transpose(1, 2))
    return grad


ROTATION = DifferentiableOp(_rotate_qkv, _rotate_qkv_backward)


class RotateQKV(AutogradFunction[tuple[Tensor, Tensor, Tensor]]):
    """Splits a fused [B, S, (N + 2 G) D] into q, k and v, and rotates q and k.

    The results are q [B, N, S, D], k and v [B, G, S, D].

    A single function, so that the backward writes the three gradients into one fused
    buffer without concatenation. In memory tokens come first, which is fastest for
    fused attention; with rotation in fp32 heads come first, as batched products need.
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
        """Returns q, k and v; `sizes`: N, G, D."""
        # A rotation's gradient needs the angles but no activations.
        ctx.save_for_backward(cos, sin)
        ctx.kernel = kernel
        q, k, v = kernel.forward(qkv, cos, sin, *sizes)
        return q, k, v

    @staticmethod
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Returns the gradient of the fused qkv."""
        cos, sin = ctx.saved_tensors
        return ctx.kernel.backward(grad_q, grad_k, grad_v, cos, sin), None, None, None, None


def _split(
    qkv: Tensor, heads: int, groups: int, head_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns views [B, S, heads, D] of the three parts."""
    by_head = qkv.view(*qkv.shape[:-1], heads + 2 * groups, head_width)
    q, k, v = torch.split(by_head, [heads, groups, groups], dim=2)
    return q, k, v


def split_qkv(
    qkv: Tensor, heads: int, groups: int, head_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v [B, heads, S, D] unrotated, for models without RoPE."""
    q, k, v = _split(qkv, heads, groups, head_width)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
