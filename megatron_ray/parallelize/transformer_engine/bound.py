"""Lets a module of the library compute with the parameters of our layers.

Owns: how tensors get into such a module, and how its gradients get into slots. Must not
know: what a module computes, ranks.

The library adds gradients of weights to `main_grad` inside of its product, and returns
those of vectors (biases, weights of norms) to autograd. One backward pass of a module is

    _begin_backward          clears main gradients that are fresh in this step
    (the library's backward) adds to them
    _Delivered.backward      notes it in the slots, and delivers the vectors' gradients
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.grad_slots import (
    SlottedModule,
    deliver_bias_grad,
    deliver_computed_grad,
    needs_grad,
)

Precision = Callable[[], AbstractContextManager[Any]]
"""Makes the context of one forward pass, which turns FP8 on."""


def without_fp8() -> AbstractContextManager[Any]:
    """Makes the context of a pass in the type of its inputs."""
    return nullcontext()


@dataclass(frozen=True)
class Vector:
    """A vector of a layer that a module of the library reads."""

    attribute: str
    """Its name in the library's module."""
    layer: SlottedModule
    name: str
    """Its name in our layer."""

    @property
    def tensor(self) -> Tensor:
        """The layer's current parameter."""
        tensor: Tensor = getattr(self.layer, self.name)
        return tensor


class BoundModule:
    """A module of the library that computes with the weight and vectors of layers."""

    def __init__(
        self,
        inner: nn.Module,
        layer: SlottedModule,
        vectors: Sequence[Vector],
        precision: Precision = without_fp8,
        num_weights: int | None = None,
    ) -> None:
        """Binds a module on device `meta` to the weight of `layer`.

        `num_weights`: number of the module's weights, which lie one after another in that
        of the layer; None for a module with one of the same shape.
        """
        self._inner = inner
        self._layer = layer
        self._vectors = vectors
        self._precision = precision
        self._num_weights = num_weights
        self._has_bias = any(vector.layer is layer for vector in vectors)
        self._bound: nn.Parameter | None = None
        self._weights: list[nn.Parameter] = []
        # Tensors with a history take their places in each pass.
        for vector in vectors:
            delattr(inner, vector.attribute)

    def run(self, inputs: Tensor, *arguments: object) -> Tensor:
        """Returns the module's output."""
        self._bind_weights()
        tensors = [vector.tensor for vector in self._vectors]
        inputs, *tensors = _Delivered.apply(self, inputs, self._layer.weight, *tensors)
        for vector, tensor in zip(self._vectors, tensors, strict=True):
            setattr(self._inner, vector.attribute, tensor)
        with self._precision():
            output: Tensor = self._inner(inputs, *arguments)
        # Not kept: their history is that of this pass.
        for vector in self._vectors:
            setattr(self._inner, vector.attribute, None)
        if output.requires_grad:
            output.register_hook(self._begin_backward)
        return output

    def _bind_weights(self) -> None:
        """Registers the layer's weight in the module, once for each new parameter."""
        weight = self._layer.get_parameter("weight")
        if weight is self._bound:
            return
        self._bound = weight
        if self._num_weights is None:
            self._weights = [weight]
            self._inner.register_parameter("weight", weight)
            return
        self._weights = []
        for index, part in enumerate(weight.detach().chunk(self._num_weights)):
            parameter = nn.Parameter(part, weight.requires_grad)
            self._weights.append(parameter)
            self._inner.register_parameter(f"weight{index}", parameter)

    def _begin_backward(self, grad: Tensor) -> None:
        slot = self._layer.slot("weight")
        if slot is None:
            # Beside a frozen weight the library computes no gradient of the bias.
            if self._has_bias:
                deliver_bias_grad(self._layer, grad)
            return
        # The module reads its own flag for that in the forward pass, when other microbatches
        # of a pipeline may still add their gradients before.
        if slot.fresh:
            slot.main_grad.zero_()
        parts = slot.main_grad.chunk(len(self._weights))
        for parameter, main_grad in zip(self._weights, parts, strict=True):
            parameter.main_grad = main_grad  # type: ignore[attr-defined]

    def deliver(self, gradients: Sequence[Tensor | None]) -> None:
        """Delivers the gradients of one backward pass; `gradients`: those of vectors."""
        slot = self._layer.slot("weight")
        if slot is not None:
            slot.contribute(_is_added)
        for vector, gradient in zip(self._vectors, gradients, strict=True):
            is_delivered = slot is None and vector.layer is self._layer
            if needs_grad(vector.layer, vector.name) and not is_delivered:
                assert gradient is not None
                deliver_computed_grad(vector.layer, vector.name, gradient)


def _is_added(main_grad: Tensor, /, *, fresh: bool) -> None:
    """Does nothing: the library has added this gradient already."""


class _Delivered(AutogradFunction[tuple[Tensor, ...]]):
    """Returns its inputs; its backward runs after that of the module which reads them."""

    @staticmethod
    def forward(
        ctx: Any, bound: BoundModule, inputs: Tensor, weight: Tensor, *vectors: Tensor
    ) -> tuple[Tensor, ...]:
        # The weight is an input, so that the backward runs even if no other one needs a
        # gradient.
        ctx.bound = bound
        ctx.set_materialize_grads(False)
        return inputs, *vectors

    @staticmethod
    def backward(
        ctx: Any, grad_inputs: Tensor | None, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.bound.deliver(gradients)
        return None, grad_inputs, None, *([None] * len(gradients))
