"""Frees the output of a small module between the forward and the backward pass.

Owns: output-discarding recompute, as Megatron-LM's `CheckpointWithoutOutput`. Must not
know: which modules of a model it is used for.

A norm or an activation is cheap to compute, but autograd keeps its output for the
product that reads it. Here the memory of the output is freed once that product, the
consumer, has run, and filled again just before the consumer's backward needs it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.backward import Backward


def discard_output(producer: nn.Module, consumer: nn.Module) -> None:
    """Frees the output of `producer` after `consumer`, its only reader, has run.

    Costs one more run of the producer and one copy of its output. The output must have
    memory of its own.
    """
    _DiscardBetween(producer, consumer)


class _DiscardBetween:
    """Wires a producer and its consumer, with a checkpoint for each forward pass.

    Several microbatches may be between their forward and their backward pass at once,
    but the consumer always runs right after the producer, so at most one checkpoint
    waits for its consumer.
    """

    def __init__(self, producer: nn.Module, consumer: nn.Module) -> None:
        self._run_producer = producer.forward
        self._awaits_consumer: CheckpointWithoutOutput | None = None
        # Not a module around the producer: names of parameters are those of the table.
        producer.forward = self._forward_of_producer
        consumer.register_forward_hook(self._after_consumer)

    def _forward_of_producer(self, *inputs: Tensor) -> Tensor:
        if not needs_grad(inputs):
            # Autograd does not go through a function whose inputs need no gradient, and
            # the producer's parameters would get none.
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
    """One output that is discarded in the forward and made again in the backward pass.

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

    The inputs are with the autograd node of the first run, which frees them with the
    rest of the graph, whether the backward pass comes or not.
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

        `consumed` is what the consumer has returned.
        """
        assert self._storage is not None
        assert consumed.grad_fn is not None
        node = self._node
        storage = self._storage
        num_bytes = storage.nbytes()
        # From here on only the hook has node and storage: a checkpoint that had its own
        # node would be a cycle, and keep the inputs until the garbage is collected.
        self._node = None
        self._storage = None
        storage.resize_(0)

        def restore(_: Any) -> None:
            self._restore_output(node.saved_tensors, storage, num_bytes)

        # On the node and not on the tensor, whose hooks come before: under ZeRO-3 one
        # of them gathers the weights that the second run needs.
        consumed.grad_fn.register_prehook(restore)

    def _restore_output(
        self,
        saved_inputs: Sequence[Tensor | None],
        storage: torch.UntypedStorage,
        num_bytes: int,
    ) -> None:
        """Runs the producer again, and copies its output into the freed memory."""
        self._inputs = detached_leaves(saved_inputs)
        # Hooks run outside of autograd's recording, but the second run needs a graph.
        with torch.enable_grad():
            output = self.run_producer(*self._inputs)
            self._second_run = Backward(output)
        # Into the same storage, since autograd has kept a reference to it for the consumer.
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
    """Runs a producer outside of autograd, which then keeps its inputs only."""

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
    """Returns what a backward pass has left at each leaf."""
    grads = list[Tensor | None]()
    for leaf in leaves:
        if leaf is None:
            grads.append(None)
        else:
            grads.append(leaf.grad)
    return grads
