"""The three matrix products of a linear layer. Owns: which library multiplies. Must not know: layers, groups.

On CUDA torch's own products are the right ones. On x86 CPUs torch hands fp32 products to MKL, which runs at half speed on processors
of another maker (measured: 110 against 250 GFLOP/s on one core); oneDNN, which torch ships too and already uses for bf16, does
not. Both are deterministic.

Shapes: T tokens, I inputs, O outputs.
"""

import torch
from torch import Tensor


def _onednn(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and torch._C._has_mkldnn


def forward_product(inputs_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """inputs @ weight^T: [T, O]."""
    if _onednn(inputs_TI):
        return torch.ops.mkldnn._linear_pointwise(inputs_TI, weight_OI, None, "none", [], "")  # type: ignore[no-any-return]
    return torch.mm(inputs_TI, weight_OI.t())


def forward_product_plus(inputs_TI: Tensor, weight_OI: Tensor, addend_TO: Tensor) -> Tensor:
    """addend + inputs @ weight^T, rounded once: [T, O]."""
    if _onednn(inputs_TI):
        return torch.ops.mkldnn._linear_pointwise.binary(inputs_TI, addend_TO, weight_OI, None, "add")  # type: ignore[no-any-return]
    return torch.addmm(addend_TO, inputs_TI, weight_OI.t())


def input_grad_product(grad_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """grad @ weight: [T, I]."""
    if _onednn(grad_TO):
        return torch.ops.mkldnn._linear_pointwise(grad_TO, weight_OI.t(), None, "none", [], "")  # type: ignore[no-any-return]
    return torch.mm(grad_TO, weight_OI)


def weight_grad_product(grad_TO: Tensor, inputs_TI: Tensor) -> Tensor:
    """grad^T @ inputs: [O, I]."""
    if _onednn(grad_TO):
        return torch.ops.mkldnn._linear_pointwise(grad_TO.t(), inputs_TI.t(), None, "none", [], "")  # type: ignore[no-any-return]
    return torch.mm(grad_TO.t(), inputs_TI)


def accumulate_weight_grad(main_OI: Tensor, grad_TO: Tensor, inputs_TI: Tensor, *, fresh: bool) -> None:
    """main (fp32) = or += grad^T @ inputs, without a temporary where the library can."""
    if inputs_TI.dtype != main_OI.dtype or _onednn(inputs_TI):
        product = weight_grad_product(grad_TO, inputs_TI)
        main_OI.copy_(product) if fresh else main_OI.add_(product)
    elif fresh:
        torch.mm(grad_TO.t(), inputs_TI, out=main_OI)
    else:
        main_OI.addmm_(grad_TO.t(), inputs_TI)
