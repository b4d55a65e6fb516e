"""The products of a layer and of experts in FP8."""

import pytest
import torch
from torch import Tensor

from megatron_ray.ops.fp8.products import Fp8GroupedMultiplication, Fp8Multiplication
from megatron_ray.ops.fp8.quantize import E4M3, E5M2
from megatron_ray.ops.fp8.recipe import Recipe

RECIPES = [
    Recipe(E5M2, "emulated"),
    Recipe(E4M3, "emulated", (1, 128), (128, 128)),
    Recipe(E4M3, "emulated", (1, 32), (1, 32)),
]
MAX_ERROR = 2**-3 + 2**-4 + 2**-6
"""Of each summand: half a step of E5M2 and of E4M3, their product and bf16's rounding."""


def matrices() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    inputs, weight, grad = torch.randn(64, 128), torch.randn(96, 128), torch.randn(64, 96)
    return inputs.bfloat16(), weight.bfloat16() / 8, grad.bfloat16() / 100


def is_near(product: Tensor, left: Tensor, right: Tensor) -> bool:
    left, right = left.double(), right.double()
    error = (product.double() - left @ right).abs()
    return bool(error.any() and (error <= MAX_ERROR * (left.abs() @ right.abs())).all())


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_near_those_of_bf16(recipe: Recipe) -> None:
    inputs, weight, grad = matrices()
    products = Fp8Multiplication(recipe).begin_pass()
    output = products.forward(inputs, weight)
    assert output.dtype == torch.bfloat16
    assert is_near(output, inputs, weight.t())
    addend = torch.ones_like(output)
    assert torch.equal(products.forward_plus(inputs, weight, addend), output + addend)
    assert is_near(products.input_grad(grad, weight), grad, weight)
    assert is_near(products.weight_grad(grad, inputs), grad.t(), inputs)
    main = torch.full((96, 128), 7.0)
    products.accumulate_weight_grad(main, grad, inputs, fresh=True)
    assert is_near(main, grad.t(), inputs)
    once = main.clone()
    products.accumulate_weight_grad(main, grad, inputs, fresh=False)
    assert torch.equal(main, 2 * once)


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_multiply_as_each_would_by_itself(recipe: Recipe) -> None:
    inputs, weight, grad = matrices()
    weights = weight.view(3, 32, 128)
    grad = grad[:, :32].contiguous()
    counts = torch.tensor([40, 0, 24])
    multiplication = Fp8Multiplication(recipe)
    grouped = Fp8GroupedMultiplication(multiplication).begin_pass()
    output = grouped.forward(inputs, weights, counts)
    input_grad = grouped.input_grad(grad, weights, counts)
    main = torch.full((3, 32, 128), 7.0)
    grouped.accumulate_weight_grad(main, grad, inputs, counts, fresh=True)
    for expert, rows in ((0, slice(0, 40)), (2, slice(40, 64))):
        alone = multiplication.begin_pass()
        assert torch.equal(output[rows], alone.forward(inputs[rows], weights[expert]))
        assert torch.equal(input_grad[rows], alone.input_grad(grad[rows], weights[expert]))
        own = torch.zeros(32, 128)
        alone.accumulate_weight_grad(own, grad[rows], inputs[rows], fresh=True)
        assert torch.equal(main[expert], own)
    assert not main[1].any()
    assert torch.equal(grouped.weight_grad(grad, inputs, counts, 3), main.bfloat16())


def test_experts_without_rows_give_an_empty_output() -> None:
    grouped = Fp8GroupedMultiplication(Fp8Multiplication(RECIPES[0])).begin_pass()
    output = grouped.forward(torch.empty(0, 128), torch.ones(2, 32, 128), 0)
    assert output.shape == (0, 32)
