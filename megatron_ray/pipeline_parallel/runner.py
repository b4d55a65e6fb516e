"""Executes a lowered schedule on one rank.

Owns: activations between forward and backward, transfers under way. Must not know: which
schedule it is, layers, the loss.

It runs the actions of the list in order and decides nothing: a trace of what it did
equals the list. Transfers are started where the list has them and waited for where
their content is used, so that they overlap with computing.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group, Pending
from megatron_ray.ops.backward import Backward
from megatron_ray.pipeline_parallel.schedules.actions import Action, Op, Order, StageMap

Chunk = Callable[[Tensor | None, int], Tensor]
"""A stage's part of the model: (activations received, microbatch) -> activations for
the next stage, or the last stage's loss (a scalar). The first stage receives None."""


class WeightGrads(Protocol):
    """Takes the weight gradients of a backward pass; see ops.weight_grad."""

    def begin_microbatch(self, *, last: bool, defer_to: Hashable | None = None) -> None:
        """Announces the backward pass of a microbatch.

        Gradients are complete only in the last one; with a key to `defer_to` they are
        computed later.
        """

    def run_deferred(self, key: Hashable, *, last: bool) -> None:
        """Computes what was deferred to the key."""


@dataclass(frozen=True)
class Transfer:
    """The form of every message: a microbatch's activations, or their gradient."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class _ForwardPass:
    """Both ends of a chunk's autograd graph of one microbatch, kept for its backward."""

    received: Tensor | None
    output: Tensor


_Key = tuple[int, int]
"""(chunk, microbatch)"""


@dataclass
class _StepState:
    """Everything that a step has made and not used yet; empty between steps."""

    forward_passes: dict[_Key, _ForwardPass] = field(default_factory=dict)
    activations: dict[_Key, Tensor] = field(default_factory=dict)
    """Inputs of forward passes."""
    gradients: dict[_Key, Tensor] = field(default_factory=dict)
    """Gradients of outputs, for backward passes."""
    to_send: dict[tuple[Op, _Key], Tensor] = field(default_factory=dict)
    """Tensors by the action that will send them."""
    receives: dict[tuple[Op, _Key], Pending] = field(default_factory=dict)
    """Receives that have been started, whose buffers are in one of the inputs above."""
    sends: list[tuple[Pending, Tensor]] = field(default_factory=list)
    """Sends that have been started; a tensor must live until its send is complete."""
    losses: dict[int, Tensor] = field(default_factory=dict)
    """Losses by microbatch, on the rank of the last stage only."""


class PipelineRunner:
    """Runs one rank's list of actions, step after step.

    `group` is the pipeline group; `on_action` is called with every action when it is done
    (traces).
    """

    def __init__(
        self,
        actions: Order,
        stages: StageMap,
        chunks: Sequence[Chunk],
        group: Group,
        transfer: Transfer,
        weight_grads: WeightGrads | None = None,
        on_action: Callable[[Action], None] | None = None,
    ) -> None:
        self._actions = actions
        self._stages = stages
        self._chunks = chunks
        self._group = group
        self._rank = collectives.rank(group)
        self._transfer = transfer
        self._weight_grads = weight_grads
        self._on_action = on_action
        # An evaluation has forward passes only, and nothing is kept for a backward.
        self._has_backward = False
        last_actions: dict[int, Action] = {}
        for action in actions:
            if action.op in (Op.BACKWARD, Op.BACKWARD_INPUT):
                self._has_backward = True
            if action.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
                last_actions[action.chunk] = action
        # Behind these a chunk's weight gradients are complete, and may be reduced.
        self._completing = set(last_actions.values())
        self._state = _StepState()
        self._handlers: dict[Op, Callable[[Action], None]] = {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.BACKWARD_INPUT: self._backward,
            Op.BACKWARD_WEIGHT: self._backward_weight,
            Op.SEND_FORWARD: self._send,
            Op.RECV_FORWARD: self._receive,
            Op.SEND_BACKWARD: self._send,
            Op.RECV_BACKWARD: self._receive,
        }

    def step(self) -> list[Tensor]:
        """Runs all microbatches, forward and backward.

        Returns the losses by microbatch on the rank of the last stage, else nothing.
        """
        self._state = _StepState()
        for action in self._actions:
            self._handlers[action.op](action)
            if self._on_action is not None:
                self._on_action(action)
        # Receives were waited for where they were used; of sends only here one can be left.
        for pending, _ in self._state.sends:
            pending.wait()
        losses = self._state.losses
        self._state = _StepState()
        return [losses[microbatch] for microbatch in sorted(losses)]

    # ---- computing

    def _forward(self, action: Action) -> None:
        key = (action.chunk, action.microbatch)
        received = self._pop_input(self._state.activations, Op.RECV_FORWARD, key)
        # The graph of a chunk begins at its input, whose gradient the previous stage needs.
        if received is not None and self._has_backward:
            received.requires_grad_()
        output = self._chunks[action.chunk](received, action.microbatch)
        if self._has_backward:
            self._state.forward_passes[key] = _ForwardPass(received, output)
        stage = self._stages.stage(self._rank, action.chunk)
        # Detached: the next stage may be on this rank, and has a graph of its own.
        if stage + 1 == self._stages.num_stages:
            self._state.losses[action.microbatch] = output.detach()
        else:
            self._pass_on(Op.SEND_FORWARD, action, stage + 1, output.detach())

    def _backward(self, action: Action) -> None:
        key = (action.chunk, action.microbatch)
        # The graph and the activations in it are freed when this returns.
        forward_pass = self._state.forward_passes.pop(key)
        gradient = self._pop_input(self._state.gradients, Op.RECV_BACKWARD, key)
        if self._weight_grads is not None:
            is_last = action in self._completing
            defer_to = key if action.op is Op.BACKWARD_INPUT else None
            self._weight_grads.begin_microbatch(last=is_last, defer_to=defer_to)
        # Where all of the first stage is frozen there is nothing to compute.
        if forward_pass.output.requires_grad:
            if gradient is None:
                torch.autograd.backward(forward_pass.output)
            else:
                Backward(forward_pass.output).run(gradient)
        if forward_pass.received is not None:
            input_gradient = forward_pass.received.grad
            assert input_gradient is not None
            stage = self._stages.stage(self._rank, action.chunk)
            self._pass_on(Op.SEND_BACKWARD, action, stage - 1, input_gradient)

    def _backward_weight(self, action: Action) -> None:
        if self._weight_grads is None:
            raise ValueError("weight gradients apart need a place that can put them off")
        is_last = action in self._completing
        key = (action.chunk, action.microbatch)
        self._weight_grads.run_deferred(key, last=is_last)

    # ---- moving

    def _pass_on(self, op: Op, action: Action, to_stage: int, content: Tensor) -> None:
        """Gives a result to a stage of this rank at once, else keeps it for its send."""
        rank, chunk = self._stages.rank_and_chunk(to_stage)
        if rank != self._rank:
            self._state.to_send[op, (action.chunk, action.microbatch)] = content
        elif op is Op.SEND_FORWARD:
            self._state.activations[chunk, action.microbatch] = content
        else:
            self._state.gradients[chunk, action.microbatch] = content

    def _pop_input(self, inputs: dict[_Key, Tensor], op: Op, key: _Key) -> Tensor | None:
        """Returns what a computing action needs, waiting for it if it is under way.

        None for the first stage's forward and the last stage's backward, which need nothing.
        """
        pending = self._state.receives.pop((op, key), None)
        if pending is not None:
            pending.wait()
        return inputs.pop(key, None)

    def _send(self, action: Action) -> None:
        key = (action.chunk, action.microbatch)
        content = self._state.to_send.pop((action.op, key)).contiguous()
        # Sent tensors are given up here, or a step would keep all it has ever sent.
        self._state.sends = [
            entry for entry in self._state.sends if not entry[0].is_completed()
        ]
        pending = collectives.start_send(content, action.peer, self._group)
        self._state.sends.append((pending, content))

    def _receive(self, action: Action) -> None:
        transfer = self._transfer
        buffer = torch.empty(transfer.shape, dtype=transfer.dtype, device=transfer.device)
        key = (action.chunk, action.microbatch)
        if action.op is Op.RECV_FORWARD:
            self._state.activations[key] = buffer
        else:
            self._state.gradients[key] = buffer
        pending = collectives.start_receive(buffer, action.peer, self._group)
        self._state.receives[action.op, key] = pending
