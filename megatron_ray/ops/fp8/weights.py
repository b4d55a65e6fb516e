"""Defines a weight that is in FP8 before a product reads it.

To autograd it is a tensor in the type of the model, and so is its gradient. Must not
know: where the values come from, products.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ray.ops.fp8.quantize import Quantized

_VIEWS = frozenset(
    {
        torch.ops.aten.detach.default,
        torch.ops.aten.view.default,
        torch.ops.aten.as_strided.default,
    }
)


class Fp8Weight(Tensor):
    """A weight [O, I] in FP8 with a scale, or weights [E x O, I] of experts with E scales.

    It can be viewed, as [E, O, I] too, and an expert's weight can be selected. Any other
    operation raises NotImplementedError, since it would be one on numbers in FP8.
    """

    fp8_values: Tensor
    inverse_E: Tensor
    """fp32 factors of the values."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type["Fp8Weight"], values: Tensor, inverse_E: Tensor, dtype: torch.dtype
    ) -> "Fp8Weight":
        """Makes a tensor of type `dtype` without memory of its own."""
        return Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), dtype=dtype, device=values.device
        )

    def __init__(self, values: Tensor, inverse_E: Tensor, dtype: torch.dtype) -> None:
        self.fp8_values = values
        self.inverse_E = inverse_E

    def quantized(self, *, transposed: bool) -> Quantized:
        """Returns a matrix with one scale, or its transpose, as an operand of a product."""
        values = self.fp8_values
        if transposed:
            values = values.t()
        return Quantized(values.contiguous(), self.inverse_E.view(()), None)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> "Fp8Weight":
        """Views the values; the scales stay, or that of the selected expert."""
        weight: Fp8Weight = args[0]
        inverse = weight.inverse_E
        if func is torch.ops.aten.select.int:
            inverse = inverse[args[2]]
        elif func not in _VIEWS:
            raise NotImplementedError(f"{func} of a weight in FP8")
        return cls(func(weight.fp8_values, *args[1:]), inverse, weight.dtype)
