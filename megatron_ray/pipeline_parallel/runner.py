"""Executes a lowered schedule on one rank.

Owns: activations between forward and backward, transfers under way.

It does what the list says, in its order, and decides nothing: a trace of what it did
equals the list. Transfers are started where the list has them and waited for where
their content is used, so that they overlap with computing. Must not know: which
schedule it is, layers, the loss.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
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
    """Where weight gradients go; see tensor_parallel.weight_grad."""

    def begin_microbatch(self, *, last: bool, defer_to: Hashable | None = None) -> None: ...

    def run_deferred(self, key: Hashable, *, last: bool) -> None: ...


@dataclass(frozen=True)
class Transfer:
    """What every message between stages is: one microbatch's activations, or their
    gradient.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class _Stash:
    """Of one microbatch in one chunk, from forward to backward."""

    received: Tensor | None
    output: Tensor


_Key = tuple[int, int]
"""(chunk, microbatch)"""


class PipelineRunner:
    """One rank's.

    `group` is the pipeline group; `on_action` hears of every action when it is done
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
        self._keeps = any(
            action.op in (Op.BACKWARD, Op.BACKWARD_INPUT) for action in actions
        )
        """Activations for a backward pass; an evaluation has none."""
        self._last = {
            action.chunk: place
            for place, action in enumerate(actions)
            if action.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT)
        }
        self._forget()

    def _forget(self) -> None:
        self._stashes: dict[_Key, _Stash] = {}
        self._activations: dict[_Key, Tensor] = {}
        """What a chunk's forward takes, and below its backward."""
        self._gradients: dict[_Key, Tensor] = {}
        self._to_send: dict[tuple[Op, int, int], Tensor] = {}
        self._arriving: dict[tuple[Op, int, int], Pending] = {}
        self._leaving: list[tuple[Pending, Tensor]] = []
        self._losses: dict[int, Tensor] = {}

    def step(self) -> list[Tensor]:
        """All microbatches, forward and backward.

        Returns the losses on the rank of the last stage, by microbatch, else nothing.
        """
        self._forget()
        doing = {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.BACKWARD_INPUT: self._backward,
            Op.BACKWARD_WEIGHT: self._backward_weight,
            Op.SEND_FORWARD: self._send,
            Op.SEND_BACKWARD: self._send,
            Op.RECV_FORWARD: self._receive,
            Op.RECV_BACKWARD: self._receive,
        }
        for place, action in enumerate(self._actions):
            if action.op in doing:
                doing[action.op](place, action)
            if self._on_action is not None:
                self._on_action(action)
        for pending, _ in self._leaving:
            pending.wait()
        losses = [self._losses[microbatch] for microbatch in sorted(self._losses)]
        self._forget()
        return losses

    # ---- computing

    def _forward(self, place: int, action: Action) -> None:
        key = (action.chunk, action.microbatch)
        received = self._take(self._activations, Op.RECV_FORWARD, key)
        if received is not None and self._keeps:
            received.requires_grad_()
        output = self._chunks[action.chunk](received, action.microbatch)
        if self._keeps:
            self._stashes[key] = _Stash(received, output)
        stage = self._stages.stage(self._rank, action.chunk)
        if stage + 1 == self._stages.num_stages:
            self._losses[action.microbatch] = output.detach()
        else:
            self._hand_over(
                stage + 1, Op.SEND_FORWARD, self._activations, action, output.detach()
            )

    def _backward(self, place: int, action: Action) -> None:
        key = (action.chunk, action.microbatch)
        stash = self._stashes.pop(key)
        gradient = self._take(self._gradients, Op.RECV_BACKWARD, key)
        if self._weight_grads is not None:
            is_last = place == self._last[action.chunk]
            defer_to = key if action.op is Op.BACKWARD_INPUT else None
            self._weight_grads.begin_microbatch(last=is_last, defer_to=defer_to)
        if stash.output.requires_grad:  # not where all of the first stage is frozen
            torch.autograd.backward(stash.output) if gradient is None else Backward(
                stash.output
            ).run(gradient)
        if stash.received is not None:
            assert stash.received.grad is not None
            stage = self._stages.stage(self._rank, action.chunk)
            self._hand_over(
                stage - 1, Op.SEND_BACKWARD, self._gradients, action, stash.received.grad
            )

    def _backward_weight(self, place: int, action: Action) -> None:
        if self._weight_grads is None:
            raise ValueError("weight gradients apart need a place that can put them off")
        is_last = place == self._last[action.chunk]
        self._weight_grads.run_deferred((action.chunk, action.microbatch), last=is_last)

    # ---- moving

    def _hand_over(
        self, stage: int, op: Op, here: dict[_Key, Tensor], action: Action, content: Tensor
    ) -> None:
        """To a stage of this rank at once, else to whoever sends it."""
        home, chunk = self._stages.home(stage)
        if home == self._rank:
            here[chunk, action.microbatch] = content
        else:
            self._to_send[op, action.chunk, action.microbatch] = content

    def _take(self, here: dict[_Key, Tensor], op: Op, key: _Key) -> Tensor | None:
        """What has come for a chunk, from another rank or from this one; None where
        nothing ever comes.
        """
        pending = self._arriving.pop((op, *key), None)
        if pending is not None:
            pending.wait()
        return here.pop(key, None)

    def _send(self, place: int, action: Action) -> None:
        content = self._to_send.pop(
            (action.op, action.chunk, action.microbatch)
        ).contiguous()
        self._leaving = [
            (pending, tensor)
            for pending, tensor in self._leaving
            if not pending.is_completed()
        ]
        self._leaving.append(
            (collectives.start_send(content, action.peer, self._group), content)
        )

    def _receive(self, place: int, action: Action) -> None:
        what = self._transfer
        buffer = torch.empty(what.shape, dtype=what.dtype, device=what.device)
        where = self._activations if action.op is Op.RECV_FORWARD else self._gradients
        where[action.chunk, action.microbatch] = buffer
        key = (action.op, action.chunk, action.microbatch)
        self._arriving[key] = collectives.start_receive(buffer, action.peer, self._group)
