"""Runs the callbacks of a run when their numbers are due.

Owns: the order of calls, the one reduction of all their numbers, their state. Must not
know: what a number means, reports.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.models.batch import Batch
from megatron_ray.optimizer.step_sums import StepSums
from megatron_ray.sharding.sharded_state import ShardedState, whole_tensor
from megatron_ray.training.callbacks.protocol import Callback, Partials

_STATE_PREFIX = "callbacks/"
"""Beginning of the names of their state in checkpoints."""


@dataclass(frozen=True)
class NamedCallback:
    """A callback and when it is due."""

    name: str
    """Its name; no two of ours, and no two installed ones, have the same."""
    every_steps: int
    callback: Callback
    is_installed: bool = False

    @property
    def field(self) -> str:
        """Its field in `callbacks`."""
        if self.is_installed:
            return f"installed/{self.name}"
        return self.name

    @property
    def names(self) -> list[str]:
        """Names of its numbers among those of all callbacks."""
        if not self.is_installed:
            return list(self.callback.names)
        return [f"{self.name}/{name}" for name in self.callback.names]


@dataclass(frozen=True)
class Monitored:
    """Numbers of a step while they are on the device, equal on every rank."""

    names: tuple[str, ...]
    values: Tensor
    """fp64, one for each name."""


class CallbackRunner:
    """The callbacks of one rank. Without any, its methods do nothing."""

    def __init__(
        self,
        callbacks: Sequence[NamedCallback] = (),
        step_group: Group = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._callbacks = callbacks
        self._step_group = step_group
        self._device = device
        self._due: list[NamedCallback] = []

    @torch.no_grad()
    def begin_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Starts a step, numbered from 1, before its forward pass."""
        self._due = []
        for entry in self._callbacks:
            entry.callback.observe(batches)
            if step % entry.every_steps == 0:
                self._due.append(entry)
                entry.callback.begin_step()

    @torch.no_grad()
    def after_backward(self, sums: StepSums) -> None:
        """Continues the step between its gradients and its update."""
        for entry in self._due:
            entry.callback.after_backward(sums)

    @torch.no_grad()
    def after_update(self) -> Monitored | None:
        """Ends the step; returns the numbers of all ranks, None if none are due.

        They are reduced together: one all-reduce, and one for maxima if there are any.
        """
        if not self._due:
            return None
        partials = [entry.callback.after_update() for entry in self._due]
        sums = self._reduced([part.sums for part in partials], dist.ReduceOp.SUM)
        maxima = self._reduced([part.maxima for part in partials], dist.ReduceOp.MAX)
        names = list[str]()
        values = []
        for index, entry in enumerate(self._due):
            names += entry.names
            reduced = Partials(sums[index], maxima[index])
            values.append(entry.callback.finish(reduced))
        return Monitored(tuple(names), torch.cat(values))

    def _reduced(
        self, parts: Sequence[Tensor], op: dist.ReduceOp.RedOpType
    ) -> Sequence[Tensor]:
        """Returns the parts after one reduction of all over the world."""
        sizes = [part.numel() for part in parts]
        flat = torch.cat([part.to(self._device) for part in parts])
        if flat.numel():
            collectives.all_reduce(flat, self._step_group, op)
        return torch.split(flat, sizes)

    @torch.no_grad()
    def before_save(self) -> None:
        """Completes the state, on all ranks at once, before it is saved or copied."""
        for entry in self._callbacks:
            entry.callback.before_save()

    def state(self) -> ShardedState:
        """Returns live views of all state, by name."""
        state: ShardedState = {}
        for entry in self._callbacks:
            prefix = f"{_STATE_PREFIX}{entry.field}/"
            for name, tensor in entry.callback.state().items():
                state[f"{prefix}{name}"] = whole_tensor(tensor)
        return state
