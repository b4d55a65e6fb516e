"""Copies a rank's state to host memory between two steps, and loads it from there.

Owns: when a copy is made, its bytes, loading it. Must not know: where copies are kept
and sent, checkpoints in storage.

A copy has all boxes of its rank, also those that other ranks have too, so that a rank
needs no other rank's copy. It fits only the layout that it was made in.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_ray.checkpoint.index import Slot, plan_copy, size_of
from megatron_ray.checkpoint.writer import copy_to_host
from megatron_ray.distributed.host_memory import allocate_lasting
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.sharding.sharded_state import ShardedState
from megatron_ray.training.progress import Progress
from megatron_ray.training.reporting.step_numbers import StepNumbers
from megatron_ray.training.saving import TrainingSaver, apply_train_state, training_state


@dataclass(frozen=True)
class StateCopy:
    """One rank's state after a step, in host memory."""

    step: int
    memory: memoryview
    """The boxes, in the order of `plan_copy`."""
    layout: str
    """Digest of names, boxes and dtypes."""
    state: Mapping[str, Any]
    """The state other than tensors, as in a checkpoint."""
    published: Mapping[str, bytes]
    """On rank 0, the published files that the run's checkpoints have too."""


class CopyStore(Protocol):
    """Keeps this rank's copies, and sends them to its partner in the background."""

    @property
    def restored(self) -> StateCopy | None:
        """The copy that the run continues from, on all ranks or on none."""

    @property
    def is_sending(self) -> bool:
        """Whether the last copy has not arrived at the partner yet."""

    def reserve(self, num_bytes: int, allocate: Callable[[int], torch.Tensor]) -> None:
        """Allocates the memory of two copies, unless it is there from an earlier run."""

    def next_memory(self) -> torch.Tensor:
        """Returns the memory for a new copy; all older ones but the last are dropped."""

    def keep(self, copy: StateCopy, wait: Callable[[], None]) -> None:
        """Keeps a copy and starts sending it, once `wait`, which may block, returns."""


class StateCopier:
    """Makes copies of one rank's state, one after another.

    A copy is due `every_steps` after the last one, once that has arrived at the partners
    of all ranks: until then, the one before it is needed.
    """

    def __init__(
        self,
        every_steps: int,
        saver: TrainingSaver,
        store: CopyStore,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._every_steps = every_steps
        self._saver = saver
        self._store = store
        self._device = device
        self._slots = plan_copy(saver.state())
        self._last_step = progress.step
        # A copy that the run continues from is sent too, to partners that lack it.
        self._all_sent = False
        # Now, so that the first copies take no longer than later ones.
        # Other than a checkpoint's memory, a store's outlives the run.
        store.reserve(size_of(self._slots), lambda size: allocate_lasting(size, device))

    @property
    def is_sending(self) -> bool:
        """Whether this rank's last copy has not arrived; each step's votes have it."""
        return self._store.is_sending

    def observe(self, steps: Sequence[StepNumbers]) -> None:
        """Notes from a step's votes that the last copies of all ranks have arrived."""
        for numbers in steps:
            # The votes of earlier steps are older than the copy.
            if numbers.host.progress.step > self._last_step and numbers.all_sent:
                self._all_sent = True

    def is_due(self, progress: Progress) -> bool:
        """Whether all ranks are to copy their state now."""
        return self._all_sent and progress.step - self._last_step >= self._every_steps

    def copy(self, progress: Progress) -> None:
        """Copies the state to host memory; the rest happens in the background."""
        memory = self._store.next_memory()
        self._store.keep(
            *copy_state(self._saver, self._slots, memory, self._device, progress)
        )
        self._last_step = progress.step
        self._all_sent = False


def copy_state(
    saver: TrainingSaver,
    slots: Sequence[Slot],
    memory: torch.Tensor,
    device: torch.device,
    progress: Progress,
) -> tuple[StateCopy, Callable[[], None]]:
    """Copies a rank's state to `memory`; every rank must call it.

    Returns the copy, and what to call, possibly in another thread, before it is read.
    """
    saver.complete_state()
    copied = copy_to_host(slots, saver.state(), memory, device)

    def wait() -> None:
        if copied is not None:
            copied.synchronize()

    copy = StateCopy(
        progress.step,
        memory.numpy().data,
        layout_of(slots),
        saver.train_state(progress),
        saver.published,
    )
    return copy, wait


def load_copy(
    copy: StateCopy,
    model: ParallelModel,
    optimizer: ShardedOptimizer,
    callbacks: ShardedState,
) -> Progress:
    """Loads a copy of the same layout and publishes the weights; returns the progress.

    Raises ValueError for a copy of another layout.
    """
    optimizer.begin_load()
    state = training_state(model, optimizer) | callbacks
    slots = plan_copy(state)
    if copy.layout != layout_of(slots) or len(copy.memory) != size_of(slots):
        raise ValueError(f"the copy of step {copy.step} has another layout than the model")
    # A tensor without a byte cannot be made from a buffer.
    if slots:
        host = torch.frombuffer(copy.memory, dtype=torch.uint8)
        for slot in slots:
            raw = host[slot.start : slot.start + slot.num_bytes]
            source = raw.view(slot.dtype).view(slot.box.size)
            state[slot.fqn].memory(slot.box).copy_(source)
    return apply_train_state(copy.state, optimizer)


def layout_of(slots: Sequence[Slot]) -> str:
    """Returns a digest of names, boxes and dtypes."""
    return hashlib.sha256(repr(slots).encode()).hexdigest()
