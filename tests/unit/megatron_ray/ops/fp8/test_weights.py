"""A weight in FP8 multiplies as the one that it was made from, and does nothing else."""

import pytest
import torch
from torch import Tensor, nn

from megatron_ray.ops.fp8.products import Fp8GroupedMultiplication, Fp8Multiplication
from megatron_ray.ops.fp8.quantize import E4M3, E5M2, amax_of, quantize_tensor, scale_for
from megatron_ray.ops.fp8.recipe import Recipe
from megatron_ray.ops.fp8.weights import Fp8Weight

MULTIPLICATION = Fp8Multiplication(Recipe(E5M2, "emulated"))


def quantized(weights_EOI: Tensor) -> Fp8Weight:
    """The weights of experts, concatenated."""
    values = []
    inverses = []
    for weight in weights_EOI:
        scale = scale_for(amax_of(weight), E4M3)
        inverses.append(scale.reciprocal())
        values.append(quantize_tensor(weight, E4M3, scale, inverses[-1]).values)
    return Fp8Weight(torch.cat(values), torch.stack(inverses), torch.bfloat16)


def test_products_are_the_same_to_the_bit() -> None:
    torch.manual_seed(3)
    inputs = torch.randn(32, 64).bfloat16()
    grad = torch.randn(32, 48).bfloat16()
    weight = torch.randn(48, 64).bfloat16()
    plain = MULTIPLICATION.begin_pass()
    products = MULTIPLICATION.begin_pass()
    in_fp8 = quantized(weight[None])
    assert torch.equal(products.forward(inputs, in_fp8), plain.forward(inputs, weight))
    assert torch.equal(products.input_grad(grad, in_fp8), plain.input_grad(grad, weight))
    assert torch.equal(products.weight_grad(grad, inputs), plain.weight_grad(grad, inputs))


def test_each_expert_has_its_own_scale() -> None:
    torch.manual_seed(4)
    weights = torch.randn(3, 32, 64).bfloat16() * torch.tensor([1.0, 9, 0.1])[:, None, None]
    inputs = torch.randn(48, 64).bfloat16()
    counts = torch.tensor([16, 0, 32])
    multiplication = Fp8GroupedMultiplication(MULTIPLICATION)
    of_experts = quantized(weights.bfloat16()).view(3, 32, 64)
    assert torch.equal(
        multiplication.begin_pass().forward(inputs, of_experts, counts),
        multiplication.begin_pass().forward(inputs, weights.bfloat16(), counts),
    )


def test_it_is_a_parameter_in_the_type_of_the_model() -> None:
    parameter = nn.Parameter(quantized(torch.ones(1, 4, 8)))
    assert (parameter.dtype, parameter.shape) == (torch.bfloat16, (4, 8))
    with pytest.raises(NotImplementedError, match=r"add\.Tensor of a weight in FP8"):
        parameter + 1
