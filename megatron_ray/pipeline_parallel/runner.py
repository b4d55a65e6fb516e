"""Executes a lowered schedule on one rank.

Owns: activations between forward and backward, pending transfers. Must not know: the
schedule's name, layers, the loss.

It runs the actions of the list in order and makes no decisions, so its trace equals the
list. Transfers are started at their position in the list and waited for at their first
use, so that they overlap with computation.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.activity import PROCESS
from megatron_ray.distributed.collectives import Group, Pending
from megatron_ray.distributed.interleaver import Interleaver, Pass
from megatron_ray.ops.backward import Backward
from megatron_ray.pipeline_parallel.schedules.actions import (
    Action,
    Op,
    Order,
    StageMap,
    in_units,
)

Chunk = Callable[[Tensor | None, int], Tensor]
"""The forward of a stage: (received activations, microbatch) -> activations for the
next stage, or the last stage's loss (a scalar). The first stage receives None."""


class WeightGrads(Protocol):
    """Schedules weight gradients of a backward pass; see ops.weight_grad."""

    def begin_microbatch(self, *, last: bool, defer_to: Hashable | None = None) -> None:
        """Announces the backward pass of a microbatch.

        Gradients are complete only after the last one; with a key `defer_to` they are
        computed later.
        """

    def run_deferred(self, key: Hashable, *, last: bool) -> None:
        """Runs the computations deferred to the key."""


@dataclass(frozen=True)
class Transfer:
    """The format of all messages: a microbatch's activations or their gradient."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class _ForwardPass:
    """Input and output of a chunk's autograd graph of a microbatch, for its backward."""

    received: Tensor | None
    output: Tensor


_Key = tuple[int, int]
"""(chunk, microbatch)"""


@dataclass
class _StepState:
    """Intermediate results of a step; empty between steps."""

    forward_passes: dict[_Key, _ForwardPass] = field(default_factory=dict)
    activations: dict[_Key, Tensor] = field(default_factory=dict)
    """Inputs of forward passes."""
    gradients: dict[_Key, Tensor] = field(default_factory=dict)
    """Gradients of outputs, for backward passes."""
    to_send: dict[tuple[Op, _Key], Tensor] = field(default_factory=dict)
    """Tensors to send, by action."""
    receives: dict[tuple[Op, _Key], Pending] = field(default_factory=dict)
    """Pending receives into buffers of `activations` or `gradients`."""
    sends: list[tuple[Pending, Tensor]] = field(default_factory=list)
    """Pending sends with their tensors, which must not be freed before completion."""
    losses: dict[int, Tensor] = field(default_factory=dict)
    """Losses by microbatch, on the rank of the last stage only."""


class PipelineRunner:
    """Runs one rank's list of actions, step after step.

    `group` is the pipeline group; `interleaver` is that of the chunks; `on_action` is
    called after every action, and where one is interrupted by another.
    """

    def __init__(
        self,
        actions: Order,
        stages: StageMap,
        chunks: Sequence[Chunk],
        group: Group,
        transfer: Transfer,
        interleaver: Interleaver,
        weight_grads: WeightGrads | None = None,
        on_action: Callable[[Action], None] | None = None,
    ) -> None:
        self._actions = actions
        self._stages = stages
        self._chunks = chunks
        self._group = group
        self._rank = collectives.rank(group)
        self._transfer = transfer
        self._interleaver = interleaver
        self._weight_grads = weight_grads
        self._on_action = on_action
        # An evaluation has forward passes only and saves nothing for a backward.
        self._has_backward = False
        last_actions: dict[int, Action] = {}
        for action in actions:
            if action.op in (Op.BACKWARD, Op.BACKWARD_INPUT):
                self._has_backward = True
            if action.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
                last_actions[action.chunk] = action
        # After these actions a chunk's weight gradients are complete and may be reduced.
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
        for unit in in_units(self._actions):
            passes = [self._pass(action) for action in unit]
            if len(passes) == 1:
                passes[0].run_alone()
            else:
                self._interleaver.run(*passes)
        # Receives have been waited for at their use; only sends can still be pending.
        for pending, _ in self._state.sends:
            pending.wait()
        losses = self._state.losses
        self._state = _StepState()
        return [losses[microbatch] for microbatch in sorted(losses)]

    def _pass(self, action: Action) -> Pass:
        def enter() -> None:
            PROCESS.microbatch = action.microbatch

        def leave() -> None:
            if self._on_action is not None:
                self._on_action(action)

        return Pass(partial(self._handlers[action.op], action), enter, leave)

    # ---- computing

    def _forward(self, action: Action) -> None:
        key = (action.chunk, action.microbatch)
        received = self._pop_input(self._state.activations, Op.RECV_FORWARD, key)
        # The graph of a chunk starts at its input, because the previous stage needs that
        # gradient.
        if received is not None and self._has_backward:
            received.requires_grad_()
        output = self._chunks[action.chunk](received, action.microbatch)
        if self._has_backward:
            self._state.forward_passes[key] = _ForwardPass(received, output)
        stage = self._stages.stage(self._rank, action.chunk)
        # Detached, because the next stage may be on this rank with a separate graph.
        if stage + 1 == self._stages.num_stages:
            self._state.losses[action.microbatch] = output.detach()
        else:
            self._pass_on(Op.SEND_FORWARD, action, stage + 1, output.detach())

    def _backward(self, action: Action) -> None:
        key = (action.chunk, action.microbatch)
        # Graph and activations are freed on return.
        forward_pass = self._state.forward_passes.pop(key)
        gradient = self._pop_input(self._state.gradients, Op.RECV_BACKWARD, key)
        if self._weight_grads is not None:
            is_last = action in self._completing
            defer_to = key if action.op is Op.BACKWARD_INPUT else None
            self._weight_grads.begin_microbatch(last=is_last, defer_to=defer_to)
        # If the whole first stage is frozen, no gradient is needed.
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
            raise ValueError(
                "a weight-gradient action needs weight_grads, which can defer it"
            )
        is_last = action in self._completing
        key = (action.chunk, action.microbatch)
        self._weight_grads.run_deferred(key, last=is_last)

    # ---- moving

    def _pass_on(self, op: Op, action: Action, to_stage: int, content: Tensor) -> None:
        """Passes a result to a stage of this rank, or stores it for its send."""
        rank, chunk = self._stages.rank_and_chunk(to_stage)
        if rank != self._rank:
            self._state.to_send[op, (action.chunk, action.microbatch)] = content
        elif op is Op.SEND_FORWARD:
            self._state.activations[chunk, action.microbatch] = content
        else:
            self._state.gradients[chunk, action.microbatch] = content

    def _pop_input(self, inputs: dict[_Key, Tensor], op: Op, key: _Key) -> Tensor | None:
        """Returns the input of a computing action, waiting for a pending receive.

        None for the first stage's forward and the last stage's backward, which have no
        input.
        """
        pending = self._state.receives.pop((op, key), None)
        if pending is not None:
            pending.wait()
        return inputs.pop(key, None)

    def _send(self, action: Action) -> None:
        key = (action.chunk, action.microbatch)
        content = self._state.to_send.pop((action.op, key)).contiguous()
        # Completed sends are dropped here, so that a step does not keep all sent tensors.
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
