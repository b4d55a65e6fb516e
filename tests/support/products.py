"""Which matrix products a piece of code computes.

Owns: a counter under torch's dispatcher, where whatever calls them must pass.
"""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ray.tensor_parallel.cross_entropy import VocabParallelHead
from megatron_ray.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

_aten = torch.ops.aten

Shape = tuple[int, int, int]
"""Of a product [rows, inner] @ [inner, columns]."""


class Products(TorchDispatchMode):
    """`linear` has every product of two matrices by shape; `attention` how often each
    fused attention ran. Batched products, which only unfused attention has, are counted
    with attention: it multiplies activations with each other and has no weights.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear: Counter[Shape] = Counter()
        self.attention: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        packet = func.overloadpacket
        name = str(func)
        if packet is torch.ops.mkldnn._linear_pointwise:
            # Takes its second matrix as a weight, [columns, inner]; with `binary` it is
            # third, behind what is added.
            weight = args[2 if "binary" in name else 1]
            self.linear[args[0].shape[0], args[0].shape[1], weight.shape[0]] += 1
        elif packet in (_aten.mm, _aten.addmm, _aten.addmm_):
            left, right = args[0 if packet is _aten.mm else 1 :][:2]
            self.linear[left.shape[0], left.shape[1], right.shape[1]] += 1
        elif "scaled_dot_product" in name or packet in (
            _aten.bmm,
            _aten.baddbmm,
            _aten.baddbmm_,
        ):
            self.attention[name] += 1
        return func(*args, **(kwargs or {}))

    def take(self) -> tuple[Counter[Shape], Counter[str]]:
        """What has come since the last call."""
        taken = (self.linear, self.attention)
        self.linear = Counter()
        self.attention = Counter()
        return taken


def linear_layers(
    module: nn.Module, *, trained_only: bool = False
) -> list[tuple[int, int]]:
    """[O, I] of each weight that the module's forward multiplies with; embeddings are
    looked up.
    """
    kinds = (ColumnParallelLinear, RowParallelLinear, VocabParallelHead)
    layers = [part.weight for part in module.modules() if isinstance(part, kinds)]
    return [
        (weight.shape[0], weight.shape[1])
        for weight in layers
        if weight.requires_grad or not trained_only
    ]


def flops(products: Counter[Shape]) -> int:
    """Multiplications and additions."""
    return sum(
        2 * rows * inner * columns * times
        for (rows, inner, columns), times in products.items()
    )
