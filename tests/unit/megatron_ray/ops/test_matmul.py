"""Products of bf16 where the processor can multiply it and where it cannot."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ray.distributed.device import kind_of
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.ops import matmul
from megatron_ray.ops.matmul import Library

PRODUCTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "forward": (
        lambda x, w, g, by: matmul.forward_product(x, w, by),
        lambda x, w, g: x @ w.t(),
    ),
    "forward_plus": (
        lambda x, w, g, by: matmul.forward_product_plus(x, w, g, by),
        lambda x, w, g: g + x @ w.t(),
    ),
    "input_grad": (
        lambda x, w, g, by: matmul.input_grad_product(g, w, by),
        lambda x, w, g: g @ w,
    ),
    "weight_grad": (
        lambda x, w, g, by: matmul.weight_grad_product(g, x, by),
        lambda x, w, g: g.t() @ x,
    ),
}


def operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((40, 24), (56, 24), (40, 56))
    ]


@pytest.mark.parametrize("library", ["torch", "fp32"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_of_bf16_is_the_exact_one_rounded(product: str, library: Library) -> None:
    ours, plain = PRODUCTS[product]
    measured = ours(*operands(), library)
    exact = plain(*(tensor.double() for tensor in operands()))
    assert measured.dtype == torch.bfloat16
    # Half a unit in the last of bf16's eight places, and what fp32 is off by where the
    # sum nearly vanishes.
    assert bool(((measured.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all())


@pytest.mark.parametrize("library", ["torch", "onednn"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_of_fp32_is_the_exact_one_by_either_library(
    product: str, library: Library
) -> None:
    ours, plain = PRODUCTS[product]
    measured = ours(*(tensor.float() for tensor in operands()), library)
    exact = plain(*(tensor.double() for tensor in operands()))
    assert measured.dtype == torch.float32
    torch.testing.assert_close(measured.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("library", ["torch", "onednn", "fp32"])
def test_a_product_is_put_into_rows_of_a_larger_one(library: Library) -> None:
    x, w, g = operands()
    if library == "onednn":
        x, w, g = x.float(), w.float(), g.float()
    for product, rows in ((matmul.forward_product, x), (matmul.input_grad_product, g)):
        expected = product(rows, w, library)
        larger = torch.zeros(3 * len(rows), expected.shape[1], dtype=rows.dtype)
        out = larger.chunk(3)[1]
        assert product(rows, w, library, out) is out
        assert torch.equal(larger.chunk(3)[1], expected)
        assert not larger.chunk(3)[0].any()
        assert not larger.chunk(3)[2].any()


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    ("dtype", "library", "rtol"),
    [
        (torch.bfloat16, "fp32", 1e-6),
        (torch.bfloat16, "torch", 2**-8),  # rounded once, before it is added
        (torch.float32, "torch", 1e-6),
        (torch.float32, "onednn", 1e-6),
    ],
)
def test_weight_gradients_are_added_up_in_fp32(
    fresh: bool, dtype: torch.dtype, library: Library, rtol: float
) -> None:
    x, _, g = (tensor.to(dtype) for tensor in operands())
    main = torch.full((56, 24), 3.0)
    matmul.accumulate_weight_grad(main, g, x, fresh=fresh, library=library)
    product = g.double().t() @ x.double()
    before = 0.0 if fresh else 3.0
    torch.testing.assert_close(main.double() - before, product, rtol=rtol, atol=1e-5)


def test_only_bf16_on_cpu_is_widened() -> None:
    assert matmul.library_for("cpu", torch.float32) in ("torch", "onednn")
    assert matmul.library_for("cpu", torch.float64) == "torch"
    assert matmul.library_for("cuda", torch.bfloat16) == "torch"
    supported = kind_of("cpu").bf16_products
    assert matmul.library_for("cpu", torch.bfloat16) == ("torch" if supported else "fp32")


class OnCuda:
    """The rows of experts on a GPU, as far as the choice of a kernel looks at them."""

    device = torch.device("cuda")
    dtype = torch.bfloat16
    shape = (4, 16, 32)

    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize(
    ("capability", "has_kernel"), [((8, 0), False), ((8, 9), False), ((9, 0), True)]
)
def test_experts_have_one_kernel_from_hopper_on(
    capability: tuple[int, int], has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = DeviceKind("cuda", bf16_products=True, capability=capability)
    monkeypatch.setattr(matmul, "kind_of", lambda _: kind)
    on_cuda: Any = OnCuda()
    assert matmul._has_grouped_kernel(on_cuda, on_cuda) is has_kernel
