"""Multiplies matrices in FP8.

Owns: the layouts that torch's kernels expect, and the emulation where there is none:
operands are dequantized and multiplied in a longer type. Which one computes is a
property of the device (`DeviceKind.multiplies_fp8`). Must not know: recipes of scales.

Shapes: M x N the product, K the sum.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

from megatron_ray.ops.fp8.quantize import Quantized
from megatron_ray.ops.matmul import forward_product

Kernel = Literal["tensorwise", "blockwise", "mxfp8", "emulated"]

_ALIGNMENT = 32
"""Bytes, and so elements, of which rows of operands are multiples: 16, or in mxfp8 the
elements of a block."""


def multiply(
    a_MK: Quantized, b_NK: Quantized, dtype: torch.dtype, kernel: Kernel
) -> Tensor:
    """Returns a @ b^T in `dtype`: [M, N]."""
    if kernel == "emulated":
        return _emulated(a_MK, b_NK, dtype)
    a_values = _aligned(a_MK.values)
    b_values = _aligned(b_NK.values).t()
    if kernel == "tensorwise":
        return torch._scaled_mm(
            a_values, b_values, a_MK.inverse, b_NK.inverse, out_dtype=dtype
        )
    if kernel == "blockwise":
        return scaled_mm(
            a_values,
            b_values,
            _by_column(a_MK),
            _block_type(a_MK),
            _by_column(b_NK),
            _block_type(b_NK),
            output_dtype=dtype,
        )
    return scaled_mm(
        a_values,
        b_values,
        _swizzled(a_MK.inverse),
        ScalingType.BlockWise1x32,
        _swizzled(b_NK.inverse),
        ScalingType.BlockWise1x32,
        swizzle_a=SwizzleType.SWIZZLE_32_4_4,
        swizzle_b=SwizzleType.SWIZZLE_32_4_4,
        output_dtype=dtype,
    )


def _emulated(a_MK: Quantized, b_NK: Quantized, dtype: torch.dtype) -> Tensor:
    # fp32 has the digits of value x scale, so that only the result is rounded. On GPUs
    # that would be slow.
    wide = torch.float32
    if a_MK.values.device.type == "cuda":
        wide = torch.bfloat16
    return forward_product(a_MK.dequantize(wide), b_NK.dequantize(wide)).to(dtype)


def _aligned(values: Tensor) -> Tensor:
    """Appends zeros to rows that are no multiple of this; experts have any number."""
    missing = -values.shape[1] % _ALIGNMENT
    if not missing:
        return values
    padded = torch.nn.functional.pad(values.view(torch.uint8), (0, missing))
    return padded.view(values.dtype)


def _block_type(matrix: Quantized) -> ScalingType:
    if matrix.block == (1, 128):
        return ScalingType.BlockWise1x128
    return ScalingType.BlockWise128x128


def _by_column(matrix: Quantized) -> Tensor:
    """Returns scales in the order of cuBLAS: a column of blocks after the other.

    Columns of square blocks are filled up to a multiple of 4.
    """
    inverse = matrix.inverse
    if matrix.block == (1, 128):
        return inverse.t().contiguous().t()
    missing = -inverse.shape[1] % 4
    return torch.nn.functional.pad(inverse, (0, missing)).t()


def _swizzled(inverse: Tensor) -> Tensor:
    """Returns E8M0 scales in the order of cuBLAS, in tiles of 128 x 4.

    https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout
    """
    rows, columns = inverse.shape
    padded = torch.nn.functional.pad(inverse, (0, -columns % 4, 0, -rows % 128), value=1.0)
    tiles = padded.to(torch.float8_e8m0fnu).view(torch.uint8)
    tiles = tiles.view(tiles.shape[0] // 128, 4, 32, tiles.shape[1] // 4, 4)
    # Of each tile the rows r, r + 32, r + 64 and r + 96 stand beside each other.
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(torch.float8_e8m0fnu)
