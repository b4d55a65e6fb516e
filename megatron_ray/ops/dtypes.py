"""Converts between floating-point types."""

from torch import Tensor


def to_fp32(tensor: Tensor) -> Tensor:
    """Returns a shorter type as fp32, and fp32 and fp64 as they are."""
    if tensor.dtype.itemsize >= 4:
        return tensor
    return tensor.float()
