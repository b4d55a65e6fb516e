"""Puts compiled elementwise operations into a model.

This file has formulas of the elementwise parts of a model, which torch.compile fuses.
Products, attention, collectives and weight-gradient slots are not compiled: they would
not gain, and are opaque to the compiler. The elementwise parts are bound by memory and
gain from fewer passes. Routed experts are not compiled, because their number of rows
changes with every microbatch and new shapes cause recompilation. Must not know: groups,
schedules.
"""

import sysconfig
from collections.abc import Callable
from functools import partial
from math import pi, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ray.config.problem import ConfigError
from megatron_ray.models.attention import Attention
from megatron_ray.models.gpt import GPT
from megatron_ray.models.mlp import GatedMLP
from megatron_ray.models.rope import rotates_in_fp32
from megatron_ray.ops.differentiable_op import DifferentiableOp
from megatron_ray.ops.dtypes import to_fp32
from megatron_ray.tensor_parallel.cross_entropy import (
    FP16_ONE,
    SoftmaxStats,
    VocabParallelHead,
)
from megatron_ray.tensor_parallel.norm import RMSNorm


class CompiledOps(NamedTuple):
    """The replaced operations; each is equivalent to that of its layer."""

    rms_norm: DifferentiableOp
    swiglu: DifferentiableOp
    geglu_tanh: DifferentiableOp
    rotation: DifferentiableOp
    softmax_shares_: Callable[[Tensor, Tensor], SoftmaxStats]


def apply_compile(model: GPT, ops: CompiledOps) -> None:
    """Puts the operations into a model.

    LayerNorm and GELU already are single kernels.
    """
    gated = {"swiglu": ops.swiglu, "geglu_tanh": ops.geglu_tanh}
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.kernel = ops.rms_norm
        # Activations of MLPs only, not of experts, see the module's docstring.
        elif isinstance(module, GatedMLP):
            module.activation.kernel = gated[model.config.activation]
        elif isinstance(module, Attention):
            module.rotation = ops.rotation
        elif isinstance(module, VocabParallelHead):
            module.softmax_shares_ = ops.softmax_shares_


def compiled_ops() -> CompiledOps:
    """Returns the formulas, each of which is compiled on first use.

    Compilation takes seconds per shape. Imports the compiler.

    Raises ConfigError if this machine lacks requirements of the compiler.
    """
    import torch._inductor.config as inductor

    _check_compiler()
    # Otherwise the compiler starts a process pool that outlives the rank.
    inductor.compile_threads = 1
    return CompiledOps(
        rms_norm=_compiled(FORMULAS.rms_norm),
        swiglu=_compiled(FORMULAS.swiglu),
        geglu_tanh=_compiled(FORMULAS.geglu_tanh),
        rotation=_compiled(FORMULAS.rotation),
        softmax_shares_=_compile(FORMULAS.softmax_shares_),
    )


# A graph break would split the fused pass, so it is an error.
_compile: Callable[[Callable[..., Any]], Callable[..., Any]] = partial(
    torch.compile, fullgraph=True
)


def _compiled(op: DifferentiableOp) -> DifferentiableOp:
    return DifferentiableOp(_compile(op.forward), _compile(op.backward))


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    missing = ""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing = "Python's headers (Python.h)"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        missing = "a C++ compiler (g++)"
    if missing:
        raise ConfigError(
            f"/training/compile: blocks needs {missing} on every node, and this one has "
            "none; install it, or set compile to none"
        )


# ---- the formulas: in fp32 whatever the type of their inputs, with one rounding at the end


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x_fp32 = to_fp32(x)
    rstd = (x_fp32.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x_fp32 * rstd * weight).to(x.dtype), rstd


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    normed = to_fp32(x) * rstd
    grad_fp32 = to_fp32(grad)
    grad_times_normed = grad_fp32 * normed
    mean = (grad_times_normed * weight).mean(-1, keepdim=True)
    grad_x = (grad_fp32 * weight - normed * mean) * rstd
    return grad_x.to(x.dtype), grad_times_normed.sum(0)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, -1)
    return to_fp32(first), to_fp32(second)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = _halves(gate_up)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = _halves(gate_up)
    grad_fp32 = to_fp32(grad)
    sigmoid = gate.sigmoid()
    # The derivative of silu(g) = g s(g) is s + g s (1 - s).
    grad_gate = grad_fp32 * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = grad_fp32 * gate * sigmoid
    return torch.cat([grad_gate, grad_up], -1).to(gate_up.dtype)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns tanh-approximated GELU (Hendrycks and Gimpel 2016) and its derivative."""
    scale = sqrt(2 / pi)
    cubic = 0.044715
    tanh = (scale * (x + cubic * x * x * x)).tanh()
    inner_slope = scale * (1 + 3 * cubic * x * x)
    slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner_slope
    return 0.5 * x * (1 + tanh), slope


def _geglu_tanh(gate_up: Tensor) -> Tensor:
    gate, up = _halves(gate_up)
    gelu, _ = _gelu_tanh(gate)
    return (gelu * up).to(gate_up.dtype)


def _geglu_tanh_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = _halves(gate_up)
    grad_fp32 = to_fp32(grad)
    gelu, slope = _gelu_tanh(gate)
    return torch.cat([grad_fp32 * up * slope, grad_fp32 * gelu], -1).to(gate_up.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [B, S, heads, D]; cos and sin have half a head's width."""
    first, second = _halves(x)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.to(x.dtype)


def _half_angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Undoes the duplication and sign of cos and sin in `rotary_angles`."""
    half = cos.shape[-1] // 2
    return cos[..., half:], sin[..., half:]


def _rotate_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, head_width: int
) -> tuple[Tensor, ...]:
    split = qkv.view(*qkv.shape[:-1], heads + 2 * groups, head_width)
    q, k, v = torch.split(split, [heads, groups, groups], dim=2)
    half_cos, half_sin = _half_angles(cos, sin)
    # Copies v, so that qkv is not kept in memory.
    parts = [_rotate(q, half_cos, half_sin), _rotate(k, half_cos, half_sin), v.clone()]
    by_head = [part.transpose(1, 2) for part in parts]
    if rotates_in_fp32(qkv.device.type, qkv.dtype):
        # Heads come first in memory, see RotateQKV.
        by_head = [part.contiguous() for part in by_head]
    return tuple(by_head)


def _rotate_qkv_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    half_cos, half_sin = _half_angles(cos, sin)
    # The gradient is rotated in the opposite direction.
    q = _rotate(grad_q.transpose(1, 2), half_cos, -half_sin)
    k = _rotate(grad_k.transpose(1, 2), half_cos, -half_sin)
    return torch.cat([q, k, grad_v.transpose(1, 2)], 2).flatten(2)


def _softmax_shares_(logits: Tensor, columns: Tensor) -> SoftmaxStats:
    logits_fp32 = to_fp32(logits)
    largest = logits_fp32.amax(1)
    label_logit = logits_fp32.gather(1, columns[:, None]).squeeze(1)
    shares = (logits_fp32 - largest[:, None]).exp()
    total = shares.sum(1)
    if logits.dtype.itemsize >= 4:
        logits.copy_(shares)
        return SoftmaxStats(largest, total, label_logit, torch.ones_like(total))
    # As probabilities, because without vocabulary sharding the later factor is one, which
    # adds no second rounding.
    unit = total.clone()
    if logits.dtype == torch.float16:
        unit = total / FP16_ONE
    logits.copy_(shares / unit[:, None])
    return SoftmaxStats(largest, total, label_logit, unit)


FORMULAS = CompiledOps(
    rms_norm=DifferentiableOp(_rms_norm, _rms_norm_backward),
    swiglu=DifferentiableOp(_swiglu, _swiglu_backward),
    geglu_tanh=DifferentiableOp(_geglu_tanh, _geglu_tanh_backward),
    rotation=DifferentiableOp(_rotate_qkv, _rotate_qkv_backward),
    softmax_shares_=_softmax_shares_,
)
