"""Converts between floating-point types."""

import torch
from torch import Tensor

_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def precision_of(dtype: torch.dtype) -> str:
    """Returns the `training.precision` with activations of this type."""
    # fp64, in tests, is computed like fp32.
    return _PRECISIONS.get(dtype, "fp32")


def to_fp32(tensor: Tensor) -> Tensor:
    """Converts shorter types to fp32; returns fp32 and fp64 unchanged."""
    if tensor.dtype.itemsize >= 4:
        return tensor
    return tensor.float()


def add_residual_(output: Tensor, residual: Tensor) -> Tensor:
    """Returns their sum, in the memory of `output` unless the residual is wider."""
    if residual.dtype != output.dtype:
        return residual + output
    return output.add_(residual)
