"""Values and scales are, bit for bit, those of a definition in float64 written here."""

from math import ceil, floor, frexp, isnan

import numpy as np
import pytest
import torch

from megatron_ray.ops.fp8 import quantize
from megatron_ray.ops.fp8.kernels import multiply
from megatron_ray.ops.fp8.quantize import E4M3, E5M2, Block, Quantized

FORMATS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}
"""Bits of the mantissa, exponent of the smallest normal number, largest number."""


def rounded(number: float, dtype: torch.dtype) -> float:
    """The nearest FP8 number, ties to even; what is too large becomes the largest."""
    bits, smallest, most = FORMATS[dtype]
    if number == 0 or isnan(number):
        return number
    exponent = max(frexp(number)[1] - 1, smallest)
    step = 2.0 ** (exponent - bits)
    # Python rounds halves to even.
    return float(min(max(round(number / step) * step, -most), most))


def scale_of(amax: float, dtype: torch.dtype, *, power_of_two: bool) -> float:
    """largest / amax in fp32, or the power of two below it."""
    if amax == 0:
        return 1.0
    scale = float(np.float32(FORMATS[dtype][2] / amax))
    if power_of_two:
        return 2.0 ** floor(np.log2(scale))
    return scale


def defined(
    matrix: np.ndarray, dtype: torch.dtype, block: Block | None
) -> tuple[np.ndarray, np.ndarray]:
    """Values and inverse scales of a matrix."""
    rows, columns = matrix.shape
    tall, wide = block or matrix.shape
    values = np.zeros_like(matrix)
    inverse = np.zeros((ceil(rows / tall), ceil(columns / wide)))
    for row in range(inverse.shape[0]):
        for column in range(inverse.shape[1]):
            here = np.s_[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
            scale = scale_of(
                np.abs(matrix[here]).max(), dtype, power_of_two=block is not None
            )
            inverse[row, column] = np.float32(1 / scale)
            # The scaled numbers are fp32.
            scaled = np.float32(matrix[here] * scale).astype(np.float64)
            values[here] = np.vectorize(rounded)(scaled, dtype)
    return values, inverse


def quantized(matrix: torch.Tensor, dtype: torch.dtype, block: Block | None) -> Quantized:
    if block is not None:
        return quantize.quantize_blocks(matrix, dtype, block)
    scale = quantize.scale_for(quantize.amax_of(matrix), dtype)
    return quantize.quantize_tensor(matrix, dtype, scale, scale.reciprocal())


def random_matrix(rows: int, columns: int) -> torch.Tensor:
    """Numbers of many sizes, rows and columns of zeros among them, in bf16."""
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(-30, 12, (rows, columns), generator=generator)
    matrix = torch.randn(rows, columns, generator=generator) * 2.0**exponents
    matrix[: rows // 4, : columns // 2] = 0
    matrix[-1] *= 1e30
    return matrix.bfloat16()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((24, 40), None),
        ((12, 96), (1, 32)),
        ((12, 80), (1, 32)),
        ((6, 256), (1, 128)),
        ((6, 144), (1, 128)),
        ((144, 160), (128, 128)),
    ],
)
def test_values_and_scales_are_the_defined_ones(
    dtype: torch.dtype, shape: tuple[int, int], block: Block | None
) -> None:
    matrix = random_matrix(*shape)
    result = quantized(matrix, dtype, block)
    values, inverse = defined(matrix.double().numpy(), dtype, block)
    assert np.array_equal(result.values.double().numpy(), values)
    assert np.array_equal(result.inverse.double().numpy().reshape(inverse.shape), inverse)
    assert result.values.is_contiguous()


@pytest.mark.parametrize("block", [None, (1, 32), (1, 128), (128, 128)])
def test_a_transposed_matrix_is_quantized_along_its_own_rows(block: Block | None) -> None:
    matrix = random_matrix(64, 48)
    turned = quantized(matrix.t(), E4M3, block)
    again = quantized(matrix.t().contiguous(), E4M3, block)
    assert torch.equal(turned.values.float(), again.values.float())
    assert torch.equal(turned.inverse, again.inverse)


def test_scales_of_blocks_are_exact_in_e8m0() -> None:
    inverse = quantized(random_matrix(12, 96), E4M3, (1, 32)).inverse
    assert torch.equal(inverse.to(torch.float8_e8m0fnu).float(), inverse)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("margin", [0, 3])
def test_scales_are_rounded_once_and_divided_by_a_margin(
    dtype: torch.dtype, margin: int
) -> None:
    amaxes = torch.rand(1000, generator=torch.Generator().manual_seed(1)) * 100
    scales = quantize.scale_for(amaxes, dtype, margin)
    expected = np.float32(FORMATS[dtype][2] / amaxes.double().numpy()) / 2**margin
    assert np.array_equal(scales.numpy(), expected)


@pytest.mark.parametrize("block", [None, (1, 32), (128, 128)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_stays_so(block: Block | None, bad: float) -> None:
    matrix = random_matrix(32, 32)
    matrix[5, 7] = bad
    product = multiply(
        quantized(matrix, E4M3, block),
        quantized(random_matrix(16, 32), E4M3, block),
        torch.bfloat16,
        "emulated",
    )
    assert not product[5].isfinite().all()


@pytest.mark.parametrize("block", [None, (1, 32), (1, 128), (128, 128)])
def test_an_emulated_product_is_that_of_the_dequantized_matrices(
    block: Block | None,
) -> None:
    a, b = random_matrix(24, 160)[:-1], random_matrix(40, 160)[:-1]
    quantized_a, quantized_b = quantized(a, E5M2, block), quantized(b, E4M3, block)
    product = multiply(quantized_a, quantized_b, torch.float32, "emulated").double()
    expected = (
        quantized_a.dequantize(torch.float64) @ quantized_b.dequantize(torch.float64).t()
    )
    assert (product - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_kernel_of_whole_tensors_gives_the_emulated_product() -> None:
    """torch has one for CPUs, so its arguments are tested on every machine."""
    for dtype in (E4M3, E5M2):
        a = quantized(random_matrix(24, 64)[:-1], dtype, None)
        b = quantized(random_matrix(48, 64)[:-1], E4M3, None)
        by_kernel = multiply(a, b, torch.float32, "tensorwise")
        emulated = multiply(a, b, torch.float32, "emulated")
        assert (by_kernel - emulated).abs().max() <= 1e-6 * emulated.abs().max()
