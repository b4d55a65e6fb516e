"""The elementwise parts of a model as plain formulas that torch.compile fuses.

Owns: those formulas, and where they go in a model.

Products, attention and collectives are left to their libraries, and weight gradients to
their slots: neither gains from being compiled, and a compiler cannot see through them.
What is left is bound by memory, where one pass instead of several is all there is to
gain. Routed experts stay as they are: their rows change with every microbatch, and new
shapes are new code. Must not know: groups, schedules.
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
from megatron_ray.tensor_parallel.cross_entropy import SoftmaxStats, VocabParallelHead
from megatron_ray.tensor_parallel.norm import RMSNorm


class CompiledOps(NamedTuple):
    """Each is to compute what the kernel of the same layer does."""

    rms_norm: DifferentiableOp
    swiglu: DifferentiableOp
    geglu_tanh: DifferentiableOp
    rotation: DifferentiableOp
    softmax_shares_: Callable[[Tensor, Tensor], SoftmaxStats]


def apply_compile(model: GPT, fusions: CompiledOps) -> None:
    """Puts them into a model. LayerNorm and GELU are one kernel each already."""
    gated = {"swiglu": fusions.swiglu, "geglu_tanh": fusions.geglu_tanh}
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.kernel = fusions.rms_norm
        elif isinstance(module, GatedMLP):
            module.activation.kernel = gated[model.config.activation]
        elif isinstance(module, Attention):
            module.rotation = fusions.rotation
        elif isinstance(module, VocabParallelHead):
            module.softmax_shares_ = fusions.softmax_shares_


def compiled_ops() -> CompiledOps:
    """The formulas, each to be compiled when it is first used (seconds), and again for
    another shape. Imports the compiler.

    Raises ConfigError where this machine lacks what the compiler needs.
    """
    import torch._inductor.config as inductor

    _refuse_without_tools()
    inductor.compile_threads = (
        1  # else it starts a pool of processes that outlives the rank
    )
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = partial(
        torch.compile, fullgraph=True
    )
    rms_norm, swiglu, geglu_tanh, rotation = (
        DifferentiableOp(compiled(kernel.forward), compiled(kernel.backward))
        for kernel in FORMULAS[:-1]
    )
    return CompiledOps(
        rms_norm, swiglu, geglu_tanh, rotation, compiled(FORMULAS.softmax_shares_)
    )


def _refuse_without_tools() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    absent = (
        ""
        if Path(sysconfig.get_path("include"), "Python.h").exists()
        else "Python's headers (Python.h)"
    )
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        absent = "a C++ compiler (g++)"
    if absent:
        raise ConfigError(
            f"/training/compile: blocks needs {absent} on every node, and this one has "
            "none; install it, or set compile to none"
        )


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = to_fp32(x)
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * rstd * weight).to(x.dtype), rstd


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    normed = to_fp32(x) * rstd
    wide = to_fp32(grad)
    projected = wide * normed
    mean = (projected * weight).mean(-1, keepdim=True)
    return ((wide * weight - normed * mean) * rstd).to(x.dtype), projected.sum(0)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = (to_fp32(half) for half in gate_up.chunk(2, -1))
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = (to_fp32(half) for half in gate_up.chunk(2, -1))
    wide = to_fp32(grad)
    share = gate.sigmoid()
    grad_gate = wide * up * share * (1 + gate * (1 - share))
    return torch.cat([grad_gate, wide * gate * share], -1).to(gate_up.dtype)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """(GELU by its tanh approximation (Hendrycks and Gimpel 2016), its slope)."""
    scale = sqrt(2 / pi)
    cubic = 0.044715
    bent = (scale * (x + cubic * x * x * x)).tanh()
    slope = 0.5 * (1 + bent) + 0.5 * x * (1 - bent * bent) * scale * (1 + 3 * cubic * x * x)
    return 0.5 * x * (1 + bent), slope


def _geglu_tanh(gate_up: Tensor) -> Tensor:
    gate, up = (to_fp32(half) for half in gate_up.chunk(2, -1))
    return (_gelu_tanh(gate)[0] * up).to(gate_up.dtype)


def _geglu_tanh_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = (to_fp32(half) for half in gate_up.chunk(2, -1))
    wide = to_fp32(grad)
    (gelu, slope) = _gelu_tanh(gate)
    return torch.cat([wide * up * slope, wide * gelu], -1).to(gate_up.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, S, heads, D]; cos and sin of half a head's width."""
    first, second = (to_fp32(half) for half in x.chunk(2, -1))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(
        x.dtype
    )


def _halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Without the doubling and the sign that rotary_angles gives them."""
    half = cos.shape[-1] // 2
    return cos[..., half:], sin[..., half:]


def _rotate_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, head_width: int
) -> tuple[Tensor, ...]:
    split = qkv.view(*qkv.shape[:-1], heads + 2 * groups, head_width)
    q, k, v = torch.split(split, [heads, groups, groups], dim=2)
    parts = [_rotated(q, *_halves(cos, sin)), _rotated(k, *_halves(cos, sin)), v.clone()]
    # heads first in memory, see RotateQKV
    if rotates_in_fp32(qkv.device.type, qkv.dtype):
        return tuple(part.transpose(1, 2).contiguous() for part in parts)
    return tuple(part.transpose(1, 2) for part in parts)


def _rotate_qkv_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    half_cos, half_sin = _halves(cos, sin)
    rotated = [
        _rotated(grad.transpose(1, 2), half_cos, -half_sin) for grad in (grad_q, grad_k)
    ]
    return torch.cat([*rotated, grad_v.transpose(1, 2)], 2).flatten(2)


def _exponentials_(logits: Tensor, local: Tensor) -> SoftmaxStats:
    wide = to_fp32(logits)
    largest = wide.amax(1)
    chosen = wide.gather(1, local[:, None]).squeeze(1)
    shares = (wide - largest[:, None]).exp()
    total = shares.sum(1)
    if logits.dtype.itemsize >= 4:
        logits.copy_(shares)
        return SoftmaxStats(largest, total, chosen, torch.ones_like(total))
    # As probabilities, so that what is rounded is multiplied by one, and not rounded
    # again, where nobody shares the vocabulary.
    logits.copy_(shares / total[:, None])
    return SoftmaxStats(largest, total, chosen, total.clone())


FORMULAS = CompiledOps(
    rms_norm=DifferentiableOp(_rms_norm, _rms_norm_backward),
    swiglu=DifferentiableOp(_swiglu, _swiglu_backward),
    geglu_tanh=DifferentiableOp(_geglu_tanh, _geglu_tanh_backward),
    rotation=DifferentiableOp(_rotate_qkv, _rotate_qkv_backward),
    softmax_shares_=_exponentials_,
)
