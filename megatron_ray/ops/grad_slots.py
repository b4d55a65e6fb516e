"""Layers whose backward hands weight gradients to slots.

Owns: the slots of a module and the delivery of its gradients. Must not know: what a
layer computes.
"""

import torch
from torch import Tensor, nn

from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.matmul import weight_grad_product
from megatron_ray.ops.weight_grad import GradSlot


class SlottedModule(nn.Module):
    """A layer whose backward hands its weight gradients to slots; without slots it is
    an ordinary module (inference).
    """

    def __init__(self, group: Group, sequence_parallel: bool) -> None:
        super().__init__()
        self.group = group
        self.sequence_group = group if sequence_parallel else None
        self.slots: dict[str, GradSlot] = {}
        self.uses = 1
        """How often a microbatch goes through it, and so how often each of its
        gradients is delivered."""

    def slot(self, name: str) -> GradSlot | None:
        """Slot of the parameter, or None where nobody collects gradients."""
        return self.slots.get(name)


def needs_grad(module: SlottedModule, name: str) -> bool:
    parameter = getattr(module, name)
    return parameter is not None and parameter.requires_grad


def deliver_linear(
    module: SlottedModule, inputs_TI: Tensor, grad_TO: Tensor
) -> Tensor | None:
    """Weight gradient to the slot, or as a tensor for autograd where there is no slot."""
    if not needs_grad(module, "weight"):
        return None
    slot = module.slot("weight")
    if slot is None:
        return weight_grad_product(grad_TO, inputs_TI)
    slot.linear(inputs_TI, grad_TO)
    return None


def deliver(module: SlottedModule, name: str, gradient: Tensor) -> Tensor | None:
    """A ready gradient to the slot, or back for autograd where there is no slot."""
    slot = module.slot(name)
    if slot is None:
        return gradient.to(getattr(module, name).dtype)
    slot.add(gradient)
    return None


def deliver_bias(module: SlottedModule, grad_TO: Tensor) -> Tensor | None:
    if not needs_grad(module, "bias"):
        return None
    return deliver(module, "bias", grad_TO.sum(0, dtype=torch.float32))


def deliver_rows(
    module: SlottedModule, weight: Tensor, rows: Tensor, grad: Tensor
) -> Tensor | None:
    slot = module.slot("weight")
    if slot is None:
        return torch.zeros_like(weight).index_add_(0, rows, grad)
    slot.add_rows(rows, grad)
    return None
