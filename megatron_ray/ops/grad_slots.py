"""Delivers a layer's weight gradients to slots or, without slots, to autograd.

Must not know: the forward of layers, groups.

Shapes: T tokens, I inputs, O outputs.
"""

from functools import partial

import torch
from torch import Tensor, nn

from megatron_ray.ops.products import PLAIN, Products
from megatron_ray.ops.weight_grad import GradSlot


class SlottedModule(nn.Module):
    """A layer with a backward that delivers weight gradients to slots.

    Without slots, as in inference and under ZeRO-3, it is an ordinary module.
    """

    def __init__(self, uses: int = 1) -> None:
        super().__init__()
        self.slots: dict[str, GradSlot] = {}
        """Slots of trainable parameters, by their name in this module."""
        self.uses = uses
        """Number of calls of the layer per microbatch, and so of contributions to each
        gradient."""

    def slot(self, name: str) -> GradSlot | None:
        """Returns the slot of a parameter, or None without one."""
        return self.slots.get(name)

    def is_deferred(self, name: str) -> bool:
        """Returns whether a parameter's gradient is computed after this backward pass."""
        slot = self.slot(name)
        return slot is not None and slot.is_deferred


def needs_grad(module: SlottedModule, name: str) -> bool:
    """Returns whether a layer has a trainable parameter of this name."""
    parameter = getattr(module, name)
    return parameter is not None and parameter.requires_grad


# The functions below return the value that a backward returns for the weight: None if the
# gradient was delivered to a slot or is not needed.


def deliver_weight_grad(
    module: SlottedModule, inputs_TI: Tensor, grad_TO: Tensor, products: Products = PLAIN
) -> Tensor | None:
    """Delivers grad^T @ inputs, the gradient of a linear layer's weight."""
    if not needs_grad(module, "weight"):
        return None
    slot = module.slot("weight")
    if slot is None:
        return products.weight_grad(grad_TO, inputs_TI)
    slot.contribute(
        partial(products.accumulate_weight_grad, grad_TO=grad_TO, inputs_TI=inputs_TI)
    )
    return None


def deliver_bias_grad(module: SlottedModule, grad_TO: Tensor) -> Tensor | None:
    """Delivers the gradient of a linear layer's bias, if any."""
    if not needs_grad(module, "bias"):
        return None
    return deliver_computed_grad(module, "bias", grad_TO.sum(0, dtype=torch.float32))


def deliver_computed_grad(
    module: SlottedModule, name: str, gradient: Tensor
) -> Tensor | None:
    """Delivers a gradient that the layer has computed itself."""
    if not needs_grad(module, name):
        return None
    slot = module.slot(name)
    if slot is None:
        return gradient.to(getattr(module, name).dtype)
    slot.contribute(partial(_accumulate_tensor, gradient))
    return None


def deliver_embedding_grad(
    module: SlottedModule, weight: Tensor, ids_T: Tensor, grad_TI: Tensor
) -> Tensor | None:
    """Delivers the gradient of an embedding; each row of `grad_TI` is added at its id."""
    slot = module.slot("weight")
    if slot is None:
        return torch.zeros_like(weight).index_add_(0, ids_T, grad_TI)
    slot.contribute(partial(_accumulate_rows, ids_T, grad_TI))
    return None


def _accumulate_tensor(gradient: Tensor, main_grad: Tensor, *, fresh: bool) -> None:
    if fresh:
        main_grad.copy_(gradient)
    else:
        main_grad.add_(gradient)


def _accumulate_rows(
    ids_T: Tensor, grad_TI: Tensor, main_grad: Tensor, *, fresh: bool
) -> None:
    # In fp32, since a frequent token's small contributions would be rounded away.
    target = main_grad
    if main_grad.dtype.itemsize < 4:
        target = torch.zeros_like(main_grad, dtype=torch.float32)
    elif fresh:
        # Cleared, because rows without a token are not written.
        main_grad.zero_()
    target.index_add_(0, ids_T, grad_TI.to(target.dtype))
    if target is not main_grad:
        _accumulate_tensor(target, main_grad, fresh=fresh)
