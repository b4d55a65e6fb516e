"""Quantizes matrices to FP8, numbers of one byte with scales of tensors or of blocks.

Owns: the formulas. Must not know: products, layers, where a scale of a whole tensor
comes from.

A matrix x becomes values = round(clamp(x * scale)) with scale = largest FP8 number /
largest |x|, and is read as values * inverse. Scales of blocks are powers of two, so that
inverse is exact. All arithmetic before the rounding is fp32.

    E4M3 (4 bits of exponent, 3 of mantissa): at most 448; E5M2: at most 57,344
    blockwise: fp32 scales of 1 x 128 elements, of 128 x 128 in weights (DeepSeek-AI 2024)
    mxfp8: E8M0 scales, powers of two of one byte, of 1 x 32 elements (OCP MX 1.0)

Shapes: R rows, K elements of a row, which a product sums over; r x k elements of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2

Block = tuple[int, int]
"""Rows and columns that share a scale."""

_EXPONENT = 0x7F800000
"""Bits of the exponent of a positive fp32 number."""
_MAX_SCALE = 2.0**127
"""Largest power of two of fp32, and of E8M0."""


@dataclass(frozen=True)
class Quantized:
    """A matrix [R, K] in FP8."""

    values: Tensor
    """[R, K], contiguous: kernels read both operands along the sum."""
    inverse: Tensor
    """fp32 factors of values: a scalar, or one per block [ceil(R / r), ceil(K / k)]."""
    block: Block | None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns values * inverse, computed in fp32."""
        values = self.values.float()
        if self.block is None:
            return values.mul_(self.inverse).to(dtype)
        rows, columns = values.shape
        blocks = _split_into_blocks(values, self.block)
        return _join(blocks * self.inverse[:, None, :, None], rows, columns).to(dtype)


def largest(dtype: torch.dtype) -> float:
    """Returns the largest number of an FP8 type."""
    return torch.finfo(dtype).max


def scale_for(amax: Tensor, dtype: torch.dtype, margin: int = 0) -> Tensor:
    """Returns largest / amax / 2^margin, fp32; 1 where everything is 0.

    It is 0 or NaN where `amax` is not finite, so that values and products are not finite
    either.
    """
    # torch divides a number by a tensor in two steps, which rounds twice.
    scale = torch.full_like(amax, largest(dtype)).div_(amax)
    scale.div_(2.0**margin).clamp_(max=_MAX_SCALE)
    return torch.where(amax == 0, 1.0, scale)


def amax_of(tensor: Tensor) -> Tensor:
    """Returns the largest absolute value, an fp32 scalar; NaN if there is one."""
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high).float()


def quantize_tensor(
    matrix_RK: Tensor, dtype: torch.dtype, scale: Tensor, inverse: Tensor
) -> Quantized:
    """Quantizes with one scale."""
    scaled = matrix_RK.float().mul(scale)
    return Quantized(_round(scaled, dtype).contiguous(), inverse, None)


def quantize_blocks(matrix_RK: Tensor, dtype: torch.dtype, block: Block) -> Quantized:
    """Quantizes with a power of two per block; blocks at the ends may be smaller."""
    rows, columns = matrix_RK.shape
    # Made contiguous while it has two bytes per element.
    blocks = _split_into_blocks(matrix_RK.contiguous().float(), block)
    scale = _floor_to_power_of_two(scale_for(blocks.abs().amax((1, 3)), dtype))
    scaled = _join(blocks * scale[:, None, :, None], rows, columns)
    return Quantized(_round(scaled, dtype), scale.reciprocal(), block)


def _round(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    # NaN passes through; a conversion alone would make infinity of what is too large in
    # E5M2.
    limit = largest(dtype)
    return scaled.clamp_(-limit, limit).to(dtype)


def _floor_to_power_of_two(scale: Tensor) -> Tensor:
    # NaN, which has all bits of the exponent, becomes infinity, and its elements stay NaN.
    return (scale.view(torch.int32) & _EXPONENT).view(torch.float32)


def _split_into_blocks(matrix: Tensor, block: Block) -> Tensor:
    """Returns [ceil(R / r), r, ceil(K / k), k], filled up with zeros."""
    rows, columns = matrix.shape
    missing_rows = -rows % block[0]
    missing_columns = -columns % block[1]
    if missing_rows or missing_columns:
        matrix = torch.nn.functional.pad(matrix, (0, missing_columns, 0, missing_rows))
    return matrix.reshape(
        (rows + missing_rows) // block[0],
        block[0],
        (columns + missing_columns) // block[1],
        block[1],
    )


def _join(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """Returns the matrix [rows, columns] of blocks."""
    return blocks.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()
