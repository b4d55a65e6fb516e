"""Frees the output of a small module between forward and backward pass.

Owns: output-discarding recomputation, as in Megatron-LM's `CheckpointWithoutOutput`.
Must not know: the modules that use it.

A norm or an activation is cheap to compute, but autograd saves its output for the
product that reads it. This module frees the output's memory after that product, the
consumer, has run, and recomputes it just before the consumer's backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.backward import Backward


def discard_output(producer: nn.Module, consumer: nn.Module) -> None:
    """Frees the output of `producer` after `consumer`, its only reader, has run.

    Costs a second run of the producer and a copy of its output. The output must not
    share memory with other tensors.
    """
    _DiscardBetween(producer, consumer)


class _DiscardBetween:
    """Connects a producer and its consumer, with a checkpoint for each forward pass.

    Several microbatches may be between forward and backward pass, but the consumer
    always runs right after the producer, so at most one checkpoint waits for its
    consumer.
    """

    def __init__(self, producer: nn.Module, consumer: nn.Module) -> None:
        self._run_producer = producer.forward
        self._awaits_consumer: CheckpointWithoutOutput | None = None
        # Not a wrapper module, which would change the names of parameters.
        producer.forward = self._forward_of_producer
        consumer.register_forward_hook(self._after_consumer)

    def _forward_of_producer(self, *inputs: Tensor) -> Tensor:
        if not needs_grad(inputs):
            # Autograd skips a function if no input needs a gradient, so the producer's
            # parameters would get no gradients.
            plain_output: Tensor = self._run_producer(*inputs)
            return plain_output
        checkpoint = CheckpointWithoutOutput(self._run_producer)
        output = checkpoint.run(*inputs)
        if output.requires_grad:  # else autograd is not recording: there is no backward
            self._awaits_consumer = checkpoint
        return output

    def _after_consumer(self, _: nn.Module, __: Any, consumed: Tensor) -> None:
        if self._awaits_consumer is not None:
            self._awaits_consumer.discard_output_until_backward_of(consumed)
            self._awaits_consumer = None


class CheckpointWithoutOutput:
    """One output, discarded in the forward and recomputed in the backward pass.

    Order of events for one microbatch::

        forward   run                   producer: inputs -> output; autograd keeps the
                                        inputs
                  (consumer runs)       autograd keeps a reference to the output
                  discard_output...     the output's memory is freed, its tensor stays
        backward  _restore_output       producer runs again, with a graph; its output
                                        is copied to where the consumer expects it
                  (consumer's backward) reads the output
                  backward              the gradient goes through the graph of the
                                        second run to the producer's inputs

    The autograd node of the first run saves the inputs and frees them with the rest of
    the graph, also without a backward pass.
    """

    def __init__(self, run_producer: Callable[..., Tensor]) -> None:
        self.run_producer = run_producer
        self._node: Any = None
        self._storage: torch.UntypedStorage | None = None
        self._inputs: list[Tensor | None] = []
        self._second_run: Backward | None = None

    def run(self, *inputs: Tensor) -> Tensor:
        """Runs the producer without keeping anything but its inputs."""
        output: Tensor = _FirstRun.apply(self, *inputs)
        self._node = output.grad_fn
        self._storage = output.untyped_storage()
        return output

    def discard_output_until_backward_of(self, consumed: Tensor) -> None:
        """Frees the output's memory until the backward pass of its consumer.

        `consumed` is the consumer's output.
        """
        assert self._storage is not None
        assert consumed.grad_fn is not None
        node = self._node
        storage = self._storage
        num_bytes = storage.nbytes()
        # From here on only the hook references node and storage: a checkpoint with a
        # reference to its own node would form a cycle, which keeps the inputs until garbage
        # collection.
        self._node = None
        self._storage = None
        storage.resize_(0)

        def restore(_: Any) -> None:
            self._restore_output(node.saved_tensors, storage, num_bytes)

        # A hook of the node runs after those of the tensor. Under ZeRO-3 one of these
        # gathers the weights that the second run needs.
        consumed.grad_fn.register_prehook(restore)

    def _restore_output(
        self,
        saved_inputs: Sequence[Tensor | None],
        storage: torch.UntypedStorage,
        num_bytes: int,
    ) -> None:
        """Runs the producer again and copies its output into the freed memory."""
        self._inputs = detached_leaves(saved_inputs)
        # Autograd does not record in hooks, but the second run needs a graph.
        with torch.enable_grad():
            output = self.run_producer(*self._inputs)
            self._second_run = Backward(output)
        # Into the same storage, to which autograd holds a reference for the consumer.
        storage.resize_(num_bytes)
        storage.copy_(output.untyped_storage())

    def backward(self, grad: Tensor) -> list[Tensor | None]:
        """Returns the gradients of the inputs, through the graph of the second run."""
        assert self._second_run is not None
        second_run = self._second_run
        inputs = self._inputs
        self._second_run = None
        self._inputs = []
        second_run.run(grad)
        return leaf_grads(inputs)


class _FirstRun(AutogradFunction[Tensor]):
    """Runs a producer without recording, so that autograd saves its inputs only."""

    @staticmethod
    def forward(ctx: Any, checkpoint: CheckpointWithoutOutput, *inputs: Tensor) -> Tensor:
        ctx.checkpoint = checkpoint
        ctx.save_for_backward(*inputs)
        return checkpoint.run_producer(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.checkpoint.backward(grad)


def needs_grad(inputs: Sequence[Tensor | None]) -> bool:
    """Returns whether any input needs a gradient."""
    for tensor in inputs:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def detached_leaves(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns the inputs as leaves of a new graph, sharing their memory."""
    leaves = list[Tensor | None]()
    for tensor in inputs:
        if tensor is None:
            leaves.append(None)
        else:
            leaves.append(tensor.detach().requires_grad_(tensor.requires_grad))
    return leaves


def leaf_grads(leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns the gradient of each leaf after a backward pass."""
    grads = list[Tensor | None]()
    for leaf in leaves:
        if leaf is None:
            grads.append(None)
        else:
            grads.append(leaf.grad)
    return grads
