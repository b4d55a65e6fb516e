"""Saving a rank's part of a checkpoint, in the background.

Owns: the host copy, the writing thread, errors that surface late.

A save blocks for the copy into host memory only. The thread writes that memory in large
blocks, without collectives, so a rank that dies meanwhile holds up nobody; the
checkpoint then simply never counts. Must not know: who commits, what is saved.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch

from megatron_ray.checkpoint.directory import INDEX
from megatron_ray.checkpoint.index import RankPlan, data_file, plan_save
from megatron_ray.checkpoint.train_state import TRAIN_STATE, rank_state_file
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.exceptions import MegatronRayError
from megatron_ray.reports import CheckpointReport
from megatron_ray.sharding.sharded_state import ShardedState
from megatron_ray.storage.storage import open_storage

BLOCK_BYTES = 16 * 1024 * 1024
RANK_KEYS = ("rng",)
"""Keys of the train state that differ between ranks."""


class WriteAbandonedError(MegatronRayError):
    """The save was given up half-way; what it has written never counts."""


class CheckpointWriter:
    """One per rank.

    `on_written` is called when the rank's part is durable: from the writing thread in
    `async` mode.

    The layout of the state (names, boxes, dtypes) is fixed by `prepare`, which plans
    collectively.
    """

    def __init__(
        self,
        mesh: ParallelMesh,
        mode: Literal["async", "sync"],
        on_written: Callable[[CheckpointReport], None],
    ) -> None:
        self._mesh = mesh
        self._on_written = on_written
        self._thread = (
            ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            if mode == "async"
            else None
        )
        self._pending: Future[None] | None = None
        self._abandoned = threading.Event()
        self._layout: list[tuple[object, ...]] = []
        self._plan: RankPlan | None = None
        self._host = torch.empty(0, dtype=torch.uint8)

    @property
    def busy(self) -> bool:
        """Whether a save is still being written."""
        return self._pending is not None and not self._pending.done()

    def prepare(self, state: ShardedState) -> None:
        """Plans and takes the host memory; every rank must call it.

        Optional: the first save does it otherwise, and takes longer.

        Raises ValueError when the boxes of all ranks do not cover the tensors.
        """
        if self._plan is None:
            self._plan = plan_save(state, self._mesh.world_group)
            self._layout = _layout(state)
            self._host = _host_memory(self._plan.num_bytes, self._mesh.device)

    def _planned(self, state: ShardedState) -> RankPlan:
        self.prepare(state)
        if self._plan is None or _layout(state) != self._layout:
            raise ValueError(
                "the layout of the state changed since the first save; a new layout needs "
                "a new CheckpointWriter"
            )
        return self._plan

    def save(
        self,
        step: int,
        path: str,
        state: ShardedState,
        train_state: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Copies this rank's part to host memory and has it written to the folder
        `path`; every rank must call it.

        Rank 0 writes `files` (name -> content, small) beside the tensors, for readers
        that have only the checkpoint.

        The live memory may change as soon as it returns. Waits first for a save that is
        under way and raises its error. Raises ValueError when the state's layout
        changed or its boxes do not cover the tensors.
        """
        self.wait()
        start = time.monotonic()
        plan = self._planned(state)
        copied = self._copy(plan, state)
        small = self._small_files(plan, train_state, files or {})
        if self._thread is None:
            self._write(step, path, small, copied, start)
        else:
            self._pending = self._thread.submit(
                self._write, step, path, small, copied, start
            )

    def wait(self) -> None:
        """Until the last save is durable. Raises the error that ended it, once."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits and ends the thread."""
        try:
            self.wait()
        finally:
            self._end()

    def abandon(self) -> None:
        """Returns at once; a save that is under way ends with the block that it is
        writing, and never counts.

        For a run that has failed and is wanted again soon.
        """
        self._abandoned.set()
        self._pending = None
        self._end(wait=False)

    def _end(self, *, wait: bool = True) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=wait)
        if self._mesh.device.type == "cuda" and self._plan is not None:
            _unlock(self._host)
        self._plan = None
        self._host = torch.empty(0, dtype=torch.uint8)

    def _copy(self, plan: RankPlan, state: ShardedState) -> torch.cuda.Event | None:
        """On CUDA the copies are queued before any later work of this stream; the event
        says when they are done.
        """
        for slot in plan.slots:
            target = (
                self._host[slot.start : slot.start + slot.num_bytes]
                .view(slot.dtype)
                .view(slot.box.size)
            )
            target.copy_(state[slot.fqn].memory(slot.box), non_blocking=True)
        if self._mesh.device.type != "cuda":
            return None
        event: torch.cuda.Event = torch.cuda.current_stream(
            self._mesh.device
        ).record_event()
        return event

    def _small_files(
        self, plan: RankPlan, train_state: Mapping[str, Any], extra: Mapping[str, bytes]
    ) -> list[tuple[str, bytes]]:
        """Made before `save` returns: the caller may go on changing its state.

        The index comes last.
        """
        rank = self._mesh.rank
        own = {key: train_state[key] for key in RANK_KEYS if key in train_state}
        small = [(rank_state_file(rank), json.dumps(own).encode())]
        if plan.index is not None:
            common = {
                key: value for key, value in train_state.items() if key not in RANK_KEYS
            }
            small += [
                *extra.items(),
                (TRAIN_STATE, json.dumps(common).encode()),
                (INDEX, plan.index),
            ]
        return small

    def _write(
        self,
        step: int,
        path: str,
        small: list[tuple[str, bytes]],
        copied: torch.cuda.Event | None,
        start: float,
    ) -> None:
        if copied is not None:
            copied.synchronize()
        storage = open_storage(path)
        memory = self._host.numpy().data
        with storage.open_output(data_file(self._mesh.rank)) as file:
            for position in range(0, len(memory), BLOCK_BYTES):
                if self._abandoned.is_set():
                    raise WriteAbandonedError
                file.write(memory[position : position + BLOCK_BYTES])
        for name, data in small:
            storage.write_bytes_atomic(name, data)
        if self._abandoned.is_set():
            raise WriteAbandonedError
        num_bytes = len(memory) + sum(len(data) for _, data in small)
        self._on_written(CheckpointReport(step, path, num_bytes, time.monotonic() - start))


def _layout(state: ShardedState) -> list[tuple[object, ...]]:
    """What must stay the same between saves."""
    return [
        (fqn, tensor.shape, held.box, held.tensor.dtype)
        for fqn, tensor in state.items()
        for held in tensor.boxes
    ]


def _host_memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Reused by every save; filled, so that the first one does not wait for the kernel
    to find its pages.

    Page-locked for CUDA by registering it: the pinned allocator would round up to a
    power of two.
    """
    memory = torch.empty(num_bytes, dtype=torch.uint8).zero_()
    if device.type == "cuda" and num_bytes:
        status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0))  # type: ignore[no-untyped-call]
        if status:
            raise MemoryError(
                f"cannot page-lock {num_bytes} bytes of host memory for checkpoints (CUDA "
                f"error {status})"
            )
    return memory


def _unlock(memory: torch.Tensor) -> None:
    if memory.numel():
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
