"""Products of bf16 where the processor can multiply it and where it cannot."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_ray.ops import matmul

PRODUCTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "forward": (lambda x, w, g: matmul.forward_product(x, w), lambda x, w, g: x @ w.t()),
    "forward_plus": (
        lambda x, w, g: matmul.forward_product_plus(x, w, g),
        lambda x, w, g: g + x @ w.t(),
    ),
    "input_grad": (lambda x, w, g: matmul.input_grad_product(g, w), lambda x, w, g: g @ w),
    "weight_grad": (
        lambda x, w, g: matmul.weight_grad_product(g, x),
        lambda x, w, g: g.t() @ x,
    ),
}


def operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((40, 24), (56, 24), (40, 56))
    ]


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_in_fp32_is_the_exact_one_rounded(
    product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        matmul, "needs_fp32_matmul", lambda device, dtype: dtype == torch.bfloat16
    )
    ours, plain = PRODUCTS[product]
    found = ours(*operands())
    exact = plain(*(tensor.double() for tensor in operands()))
    assert found.dtype == torch.bfloat16
    # Half a unit in the last of bf16's eight places, and what fp32 is off by where the
    # sum nearly vanishes.
    assert bool(((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all())


@pytest.mark.parametrize("fresh", [True, False])
def test_weight_gradients_are_added_up_in_fp32_unrounded(
    fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        matmul, "needs_fp32_matmul", lambda device, dtype: dtype == torch.bfloat16
    )
    x, _, g = operands()
    main = torch.full((56, 24), 3.0)
    matmul.accumulate_weight_grad(main, g, x, fresh=fresh)
    exact = g.double().t() @ x.double() + (0.0 if fresh else 3.0)
    torch.testing.assert_close(main.double(), exact, rtol=1e-6, atol=1e-5)


def test_only_bf16_on_cpu_is_widened() -> None:
    assert not matmul.needs_fp32_matmul("cpu", torch.float32)
    assert not matmul.needs_fp32_matmul("cuda", torch.bfloat16)
    assert (
        matmul.needs_fp32_matmul("cpu", torch.bfloat16)
        is not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
