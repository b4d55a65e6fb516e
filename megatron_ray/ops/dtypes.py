"""Conversions between floating-point types. Owns: which types count as short."""

from torch import Tensor


def to_fp32(tensor: Tensor) -> Tensor:
    """fp32 for shorter types; fp32 and fp64 as they are."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
