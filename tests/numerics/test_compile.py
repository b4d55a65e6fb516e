"""The formulas that are compiled against the kernels that they replace, plain and
compiled.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_ray.config.problem import ConfigError
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.mlp import GEGLU_TANH, SWIGLU, GatedActivation
from megatron_ray.models.rope import ROTATION, rotary_angles
from megatron_ray.ops.differentiable_op import DifferentiableOp
from megatron_ray.parallelize import compile
from megatron_ray.parallelize.parallelize import build_model
from megatron_ray.tensor_parallel.cross_entropy import SoftmaxStats, softmax_shares_
from megatron_ray.tensor_parallel.norm import RMS_NORM

# A kernel rounds some intermediate result where a formula does not.
ALLOWED = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.bfloat16: 1.2e-2,
    torch.float16: 1.5e-3,
}
BATCH = 2
SEQUENCE = 24
HEADS = 4
GROUPS = 2
WIDTH = 16
TOKENS = BATCH * SEQUENCE


def draw(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms_norm(kernel: DifferentiableOp, dtype: torch.dtype) -> list[Tensor]:
    x = draw(dtype, TOKENS, 48)
    weight = draw(dtype, 48, seed=1)
    grad = draw(dtype, TOKENS, 48, seed=2)
    output, rstd = kernel.forward(x, weight, 1e-5)
    return [output, rstd, *kernel.backward(grad, x, weight, rstd)]


def gated(kernel: DifferentiableOp, dtype: torch.dtype) -> list[Tensor]:
    gate_up = draw(dtype, TOKENS, 96)
    return [
        kernel.forward(gate_up),
        kernel.backward(draw(dtype, TOKENS, 48, seed=1), gate_up),
    ]


def rotation(kernel: DifferentiableOp, dtype: torch.dtype) -> list[Tensor]:
    cos, sin = rotary_angles(torch.arange(SEQUENCE)[None], WIDTH, 10_000.0, dtype)
    qkv = draw(dtype, BATCH, SEQUENCE, (HEADS + 2 * GROUPS) * WIDTH)
    rotated = kernel.forward(qkv, cos, sin, HEADS, GROUPS, WIDTH)
    assert all(
        part.stride(-1) == 1 and part.data_ptr() != qkv.data_ptr() for part in rotated
    )
    grads = [
        draw(dtype, BATCH, SEQUENCE, heads, WIDTH, seed=heads).transpose(1, 2)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    return [*rotated, kernel.backward(*grads, cos, sin)]


def loss(
    softmax_shares_: Callable[[Tensor, Tensor], SoftmaxStats], dtype: torch.dtype
) -> list[Tensor]:
    """Shares times their unit are the same however they are scaled."""
    logits = 3 * draw(dtype, TOKENS, 100)
    local = torch.arange(TOKENS) * 2
    stats = softmax_shares_(logits, local)
    return [
        stats.largest,
        stats.total,
        stats.label_logit,
        logits.to(stats.unit.dtype) * stats.unit[:, None],
    ]


CASES: dict[str, tuple[Callable[[Any, torch.dtype], list[Tensor]], Any]] = {
    "rms_norm": (rms_norm, RMS_NORM),
    "swiglu": (gated, SWIGLU),
    "geglu_tanh": (gated, GEGLU_TANH),
    "rotation": (rotation, ROTATION),
    "softmax_shares_": (loss, softmax_shares_),
}


def close(measured: list[Tensor], expected: list[Tensor], allowed: float) -> None:
    for one, two in zip(measured, expected, strict=True):
        assert one.dtype == two.dtype
        assert one.shape == two.shape
        assert float((one.double() - two.double()).norm()) <= allowed * float(
            two.double().norm()
        )


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("case", CASES)
def test_a_formula_is_its_kernel(case: str, dtype: torch.dtype) -> None:
    run, kernel = CASES[case]
    close(run(getattr(compile.FORMULAS, case), dtype), run(kernel, dtype), ALLOWED[dtype])


# torch's own compiler
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.parity)]
)
def test_what_the_compiler_makes_of_a_formula_is_the_formula(dtype: torch.dtype) -> None:
    fusions = compile.compiled_ops()
    for case, (run, _) in CASES.items():
        close(
            run(getattr(fusions, case), dtype),
            run(getattr(compile.FORMULAS, case), dtype),
            ALLOWED[dtype],
        )


@pytest.mark.parametrize(("activation", "norms"), [("swiglu", 2), ("geglu_tanh", 4)])
def test_every_part_of_a_model_but_its_routed_experts_is_replaced(
    activation: str, norms: int
) -> None:
    shape: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    shape |= {"activation": activation, "qk_norm": norms == 4}
    moe = {
        "num_experts": 4,
        "shared_expert_ffn_hidden_size": 48,
    }
    config = TrainConfig.from_mapping(
        {
            "model": shape | {"moe": moe},
            "data": {"train": [{"path": "unused"}]},
            "training": {"seq_length": 8, "global_batch_size": 1, "steps": 1},
            "optimizer": {"lr": 1e-3},
        }
    )
    model = build_model(
        config.model, ParallelMesh.single(), config.parallel, dtype=torch.float32
    )
    mark: Any = DifferentiableOp(lambda: None, lambda: None)
    compile.apply_compile(
        model, compile.CompiledOps(*(mark for _ in compile.CompiledOps._fields))
    )

    def of(module: nn.Module) -> object:
        names = ("rotation", "kernel", "softmax_shares_")
        return next(
            (getattr(module, name) for name in names if hasattr(module, name)), None
        )

    replaced = [name for name, module in model.named_modules() if of(module) is mark]
    kept = [
        name
        for name, module in model.named_modules()
        if isinstance(module, GatedActivation) and of(module) is not mark
    ]
    assert len(replaced) == 2 * (norms + 2) + 2, replaced
    assert kept == [f"layers.{layer}.moe.experts.activation" for layer in range(2)]


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.cpp_builder as builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(builder, "get_cpp_compiler", none)
    with pytest.raises(
        ConfigError,
        match=r"/training/compile: blocks needs a C\+\+ compiler .* or set compile to none",
    ):
        compile.compiled_ops()
