"""torch's kernels compute the products that the emulation does."""

import pytest
import torch
from torch import Tensor

from megatron_ray.distributed.device import kind_of
from megatron_ray.ops.fp8 import kernels
from megatron_ray.ops.fp8.kernels import Kernel, multiply
from megatron_ray.ops.fp8.quantize import (
    E4M3,
    E5M2,
    Block,
    Quantized,
    amax_of,
    quantize_blocks,
    quantize_tensor,
    scale_for,
)


def quantized(matrix: Tensor, dtype: torch.dtype, block: Block | None) -> Quantized:
    if block is not None:
        return quantize_blocks(matrix, dtype, block)
    scale = scale_for(amax_of(matrix), dtype)
    return quantize_tensor(matrix, dtype, scale, scale.reciprocal())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", [(256, 512, 384), (128, 128, 128), (48, 640, 96)])
@pytest.mark.parametrize(
    ("recipe", "kernel", "dtype", "blocks"),
    [
        ("current", "tensorwise", E4M3, (None, None)),
        ("current", "tensorwise", E5M2, (None, None)),
        ("blockwise", "blockwise", E4M3, ((1, 128), (128, 128))),
        ("blockwise", "blockwise", E4M3, ((1, 128), (1, 128))),
        ("mxfp8", "mxfp8", E4M3, ((1, 32), (1, 32))),
    ],
)
def test_a_kernel_gives_the_emulated_product(
    recipe: str,
    kernel: Kernel,
    dtype: torch.dtype,
    blocks: tuple[Block | None, Block | None],
    sizes: tuple[int, int, int],
) -> None:
    device = kind_of("cuda")
    if not device.multiplies_fp8(recipe):
        pytest.skip(f"{device} has no kernel for {recipe}")
    rows, inner, columns = sizes
    torch.manual_seed(4)
    a = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16) / 50
    # Blocks of very different sizes, so that a scale in a wrong place is seen.
    a[:, :32] *= 64
    b[: columns // 2] *= 64
    quantized_a = quantized(a, dtype, blocks[0])
    quantized_b = quantized(b, E4M3, blocks[1])
    for output in (torch.bfloat16, torch.float32):
        product = multiply(quantized_a, quantized_b, output, kernel).double()
        exact = (
            quantized_a.dequantize(torch.float64)
            @ quantized_b.dequantize(torch.float64).t()
        )
        sizes_of_sums = (
            quantized_a.dequantize(torch.float64).abs()
            @ quantized_b.dequantize(torch.float64).t().abs()
        )
        # bf16's rounding, and sums of 14 bits on Hopper.
        assert ((product - exact).abs() <= 2**-7 * sizes_of_sums).all()


def test_scales_of_mxfp8_stand_in_tiles() -> None:
    """Each tile is 128 rows of 4 blocks: rows 32 apart stand beside each other."""
    rows, columns = 130, 6
    exponents = torch.arange(rows)[:, None] % 64 - torch.arange(columns)
    inverse = 2.0**exponents
    tiles = kernels._swizzled(inverse).float().view(2, 2, 32, 4, 4)
    for row, column in ((0, 0), (31, 3), (32, 0), (127, 5), (128, 4), (129, 1)):
        within = row % 128
        place = (row // 128, column // 4, within % 32, within // 32, column % 4)
        assert tiles[place] == inverse[row, column]
    assert tiles[1, 0, 2, 0, 0] == 1, "filled up"


def test_scales_of_blocks_stand_in_columns() -> None:
    """Strides as torch's kernel checks them."""
    narrow = quantize_blocks(torch.ones(48, 640), E4M3, (1, 128))
    assert kernels._by_column(narrow).shape == (48, 5)
    assert kernels._by_column(narrow).stride() == (1, 48)
    square = quantize_blocks(torch.ones(384, 640), E4M3, (128, 128))
    assert kernels._by_column(square).shape == (8, 3)
    assert kernels._by_column(square).stride() == (1, 8)


def test_rows_of_experts_are_filled_up_with_zeros() -> None:
    values = torch.ones(16, 41).to(E4M3)
    filled = kernels._aligned(values)
    assert filled.shape == (16, 64)
    assert torch.equal(filled.float().sum(1), torch.full((16,), 41.0))
    assert kernels._aligned(filled) is filled
