"""Recomputes a region without the operations whose outputs it saves.

Owns: regions that are kept as their input and the outputs of chosen operations
(PyTorch's selective activation checkpointing). Must not know: which operations.

The first run of a region executes a chosen operation with a graph of its own, of which
it keeps all tensors but those that are in the operation's inputs. The second run, in the
backward pass, does not execute it: it takes the output, and the backward pass goes
through the graph of the first run, which reads the inputs that the second run has
computed. So gradients are those without recomputation to the bit, and an operation needs
no code for this.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import local
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.backward import Backward
from megatron_ray.parallelize.discard_output import (
    detached_leaves,
    leaf_grads,
    needs_grad,
)

Value = TypeVar("Value")


class OutputSaver:
    """Connects the recomputation of a region with its chosen operations.

    Several microbatches may be between forward and backward pass. Two of them may be in
    the region at once, one in each pass, where passes are interleaved: each has its thread.
    """

    def __init__(self) -> None:
        self._current = _Current()

    def recomputed(
        self,
        run: Callable[[Tensor], Tensor],
        first: Callable[[Tensor], Tensor],
        again: Callable[[Tensor], Tensor],
        region_input: Tensor,
    ) -> Tensor:
        """Returns run(region_input), and saves that input and the outputs of operations.

        The functions are those of `recompute.recomputed`; operations are executed by
        `first` only.
        """
        if not needs_grad([region_input]):
            return run(region_input)
        return _Recomputed.apply(self, first, again, region_input)

    def saving(
        self,
        operation: Callable[..., Tensor],
        *,
        is_changed: bool = False,
        is_read: bool = True,
    ) -> Callable[..., Tensor]:
        """Returns the operation with its output saved in each run of the region.

        Its gradient goes to all arguments that are tensors of floating-point numbers.
        `is_changed`: the region changes the output in place. Without `is_read` only the
        output's gradient is used, so its values are undefined in the second run.
        """

        def run(*arguments: Any, **options: Any) -> Tensor:
            if self._current.run is None:
                # No training, or nothing before the region needs a gradient.
                return operation(*arguments, **options)
            if self._current.run.is_second:
                return self._current.run.replay(arguments)
            execute = partial(operation, **options)
            return self._current.run.record(execute, arguments, is_changed, is_read)

        return run

    def remember(self, compute: Callable[[], Value]) -> Value:
        """Returns what `compute` returns in the first run, also in the second one."""
        if self._current.run is None:
            return compute()
        if not self._current.run.is_second:
            value = compute()
            self._current.run.values.append(value)
            return value
        first_value: Value = self._current.run.values.popleft()
        return first_value

    @contextmanager
    def running(self, run: "_Run") -> Iterator[None]:
        """Records the operations of a run, or replays them."""
        self._current.run = run
        try:
            yield
        finally:
            self._current.run = None


class _Current(local):
    """The run of the thread that reads it."""

    run: "_Run | None" = None


@dataclass
class _Run:
    """What a region has saved of one microbatch, in the order of its operations."""

    is_second: bool = False
    tensors: list[Tensor] = field(default_factory=list)
    """All tensors that are kept. In between the runs autograd has them, so that they are
    freed with its graph."""
    operations: "deque[_Operation]" = field(default_factory=deque)
    values: deque[Any] = field(default_factory=deque)

    def record(
        self,
        operation: Callable[..., Tensor],
        arguments: Sequence[Any],
        is_changed: bool,
        is_read: bool,
    ) -> Tensor:
        """Executes an operation with a graph of its own and keeps its output."""
        inputs = _Inputs.of(arguments)
        gradients: list[Tensor | None] = [None] * len(arguments)
        saved = _SavedTensors(self.tensors, inputs)
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)
        # Autograd does not record in a region's first run.
        with torch.enable_grad(), hooks:
            entered = list(arguments)
            for index, tensor in inputs.tensors.items():
                entered[index] = _Enter.apply(
                    tensor.new_empty((), requires_grad=True), tensor, index, gradients
                )
            output = operation(*entered)
            backward = Backward(output)
        output = output.detach()
        kept = output
        if not is_read:
            kept = torch.empty_like(output, device="meta")
        elif is_changed:
            kept = output.clone()
        self.operations.append(
            _Operation(len(self.tensors), output.device, backward, inputs, gradients)
        )
        self.tensors.append(kept)
        inputs.clear()
        return output

    def replay(self, arguments: Sequence[Any]) -> Tensor:
        """Returns the output of the next operation without executing it."""
        operation = self.operations.popleft()
        output = self.tensors[operation.output]
        if output.is_meta:
            output = torch.empty_like(output, device=operation.device)
        return _Replay.apply(output, operation, *arguments)


@dataclass
class _Inputs:
    """The inputs of an operation that get gradients, by their place in its arguments.

    There are none between the two runs.
    """

    tensors: dict[int, Tensor]
    read: set[int] = field(default_factory=set)
    """Places of inputs that the operation's backward pass reads."""

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> "_Inputs":
        inputs = cls({})
        for index, argument in enumerate(arguments):
            if isinstance(argument, Tensor) and argument.is_floating_point():
                inputs.tensors[index] = argument.detach()
        return inputs

    def clear(self) -> None:
        self.tensors = {}


@dataclass(frozen=True)
class _Operation:
    """One executed operation. Its inputs are not kept."""

    output: int
    """Place of its output in the run's tensors."""
    device: torch.device
    backward: Backward
    inputs: _Inputs
    gradients: list[Tensor | None]
    """Those of its arguments, from the backward pass on."""


@dataclass(frozen=True)
class _View:
    """A tensor in the memory of an input."""

    index: int
    """The input's place in the arguments."""
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """Elements after the input's first one."""


class _SavedTensors:
    """What an operation's graph saves: places of tensors, or views of inputs.

    It must not reference the graph, which references it.
    """

    def __init__(self, tensors: list[Tensor], inputs: _Inputs) -> None:
        self._tensors = tensors
        self._inputs = inputs

    def pack(self, tensor: Tensor) -> "int | _View":
        for index, of_region in self._inputs.tensors.items():
            if _shares_memory(tensor, of_region):
                self._inputs.read.add(index)
                offset = int(tensor.storage_offset() - of_region.storage_offset())
                return _View(index, tensor.size(), tensor.stride(), offset)
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def unpack(self, packed: "int | _View") -> Tensor:
        if isinstance(packed, int):
            return self._tensors[packed]
        again = self._inputs.tensors[packed.index]
        offset = int(again.storage_offset()) + packed.offset
        return again.as_strided(packed.size, packed.stride, offset)


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    # Not by address, which is the same for all tensors without elements.
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


class _Enter(AutogradFunction[Tensor]):
    """An operation's input, whose gradient is put into a list.

    A leaf would do this too, but its node keeps the leaf's memory. `anchor` needs a
    gradient and gets none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        tensor: Tensor,
        index: int,
        gradients: list[Tensor | None],
    ) -> Tensor:
        ctx.index = index
        ctx.gradients = gradients
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.gradients[ctx.index] = grad
        return None, None, None, None


class _Replay(AutogradFunction[Tensor]):
    """The node of an operation in the second run; its backward is that of the first."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, operation: _Operation, *arguments: Any) -> Tensor:
        ctx.operation = operation
        ctx.read = sorted(operation.inputs.read)
        ctx.save_for_backward(*[arguments[index] for index in ctx.read])
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operation: _Operation = ctx.operation
        operation.inputs.tensors = dict(zip(ctx.read, ctx.saved_tensors, strict=True))
        operation.backward.run(grad)
        operation.inputs.clear()
        return None, None, *operation.gradients


class _Recomputed(AutogradFunction[Tensor]):
    @staticmethod
    def forward(
        ctx: Any,
        saver: OutputSaver,
        first: Callable[[Tensor], Tensor],
        again: Callable[[Tensor], Tensor],
        region_input: Tensor,
    ) -> Tensor:
        ctx.saver = saver
        ctx.again = again
        ctx.run = _Run()
        with saver.running(ctx.run):
            output = first(region_input)
        ctx.save_for_backward(region_input, *ctx.run.tensors)
        ctx.run.tensors.clear()
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saver: OutputSaver = ctx.saver
        run: _Run = ctx.run
        region_input, *tensors = ctx.saved_tensors
        run.tensors.extend(tensors)
        run.is_second = True
        inputs = detached_leaves([region_input])
        # Builds the graph from the region's input to its output.
        with torch.enable_grad(), saver.running(run):
            second_run = Backward(ctx.again(*inputs))
        second_run.run(grad)
        run.tensors.clear()
        return None, None, None, *leaf_grads(inputs)
