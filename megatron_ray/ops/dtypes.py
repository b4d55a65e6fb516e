"""Converts between floating-point types."""

from torch import Tensor


def to_fp32(tensor: Tensor) -> Tensor:
    """Converts shorter types to fp32; returns fp32 and fp64 unchanged."""
    if tensor.dtype.itemsize >= 4:
        return tensor
    return tensor.float()
