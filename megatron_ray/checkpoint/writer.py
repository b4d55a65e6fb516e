"""Saves a rank's part of a checkpoint, in the background.

Owns: the host copy, the writing thread, errors of background writes. Must not know: the
commit, the contents.

A save blocks only for the copy into host memory. The thread writes that memory in large
blocks, without collectives, so a rank that dies meanwhile delays no other rank; the
checkpoint is then never committed.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_ray.checkpoint.directory import INDEX
from megatron_ray.checkpoint.index import RankPlan, Slot, data_file, plan_save
from megatron_ray.checkpoint.integrity.digests import DigestedFiles
from megatron_ray.checkpoint.train_state import TRAIN_STATE, rank_state_file
from megatron_ray.distributed.host_memory import allocate_host, unregister_host
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.exceptions import MegatronRayError
from megatron_ray.reports import CheckpointFailedReport, CheckpointReport
from megatron_ray.sharding.sharded_state import ShardedState
from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.outages import RETRY_S, FailedSaves
from megatron_ray.storage.storage import open_storage

BLOCK_BYTES = 16 * 1024 * 1024
RANK_KEYS = ("rng",)
"""Keys of the train state that differ between ranks."""

SmallFiles = list[tuple[str, bytes]]
"""Name and content, in the order in which they are written."""


class WriteAbandonedError(MegatronRayError):
    """The save was abandoned; its files never become part of a committed checkpoint."""


@dataclass(frozen=True)
class _Save:
    """One save, whose tensors are in the host memory."""

    step: int
    path: str
    small_files: SmallFiles
    start: float
    copied: torch.cuda.Event | None


class CheckpointWriter:
    """Writes this rank's part of every checkpoint of a run.

    `on_written` is called when the rank's part is durable, in `async` mode from the
    writing thread. `prepare`, a collective, fixes the layout of the state (names,
    boxes, dtypes).

    With `on_failed`, which is called likewise, an error of the storage ends no run: the
    next save is the next try, and `wait` tries the last one again. Errors are raised
    only as `storage.outages` decides.
    """

    def __init__(
        self,
        mesh: ParallelMesh,
        mode: Literal["async", "sync"],
        on_written: Callable[[CheckpointReport], None],
        on_failed: Callable[[CheckpointFailedReport], None] | None = None,
    ) -> None:
        self._mesh = mesh
        self._on_written = on_written
        self._on_failed = on_failed
        self._failed = FailedSaves()
        self._unwritten: _Save | None = None
        """The last save, if the storage has refused it."""
        self._executor: ThreadPoolExecutor | None = None
        if mode == "async":
            # One thread: there is one host copy, so one save at a time.
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        # Set by the main thread, read by the writing thread between two blocks.
        self._abandoned = threading.Event()
        self._layout: list[tuple[object, ...]] = []
        self._plan: RankPlan | None = None
        self._host = torch.empty(0, dtype=torch.uint8)

    @property
    def busy(self) -> bool:
        """Whether a save is still being written."""
        return self._pending is not None and not self._pending.done()

    def prepare(self, state: ShardedState) -> None:
        """Plans the files and allocates the host memory; every rank must call it.

        Optional: otherwise the first save does it, and takes longer. Raises ValueError
        when the boxes of all ranks do not cover the tensors.
        """
        if self._plan is None:
            self._plan = plan_save(state, self._mesh.world_group)
            self._layout = _layout(state)
            # Kept for the whole run, because page-locking it again would delay every save.
            self._host = allocate_host(self._plan.num_bytes, self._mesh.device)

    def save(
        self,
        step: int,
        path: str,
        state: ShardedState,
        train_state: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Copies this rank's part to host memory and starts writing it to folder `path`.

        Every rank must call it. Rank 0 writes `files` (name -> content, small) beside
        the tensors, for readers that have only the checkpoint. The live memory may
        change as soon as this method returns.

        First waits for a running save and raises its error. Raises ValueError when the
        state's layout changed or its boxes do not cover the tensors.
        """
        # The host memory can be reused only after the previous save has been written.
        self._finish_pending()
        # This save replaces one that has failed.
        self._unwritten = None
        start = time.monotonic()
        plan = self._plan_for(state)
        copied = copy_to_host(plan.slots, state, self._host, self._mesh.device)
        # Serialized before `save` returns, because the caller may then change its state.
        small_files = self._small_files(plan, train_state, files or {})
        save = _Save(step, path, small_files, start, copied)
        if self._executor is None:
            self._try_to_write(save)
        else:
            self._pending = self._executor.submit(self._try_to_write, save)

    def wait(self) -> None:
        """Blocks until the last save is durable. Raises the error that ended it, once."""
        self._finish_pending()
        # No other save follows, so a failed one is tried again.
        save = self._unwritten
        self._unwritten = None
        if save is not None:
            self._write_at_last(save)

    def _finish_pending(self) -> None:
        # Cleared before reading the result, so that an error is raised only once.
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def _write_at_last(self, save: _Save) -> None:
        """Writes a save that has failed, after some pauses. Raises the last error."""
        *pauses, last_pause = RETRY_S
        for pause_s in pauses:
            self._abandoned.wait(pause_s)
            with suppress(StorageError):
                self._write(save)
                return
        self._abandoned.wait(last_pause)
        self._write(save)

    def close(self) -> None:
        """Waits for the last save and ends the thread. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._release()

    def abandon(self) -> None:
        """Abandons a running save and returns at once.

        The thread ends after the current block, and the save is never committed. For a
        run that has failed and is to restart soon.
        """
        self._abandoned.set()
        self._pending = None
        self._release(wait=False)

    def _release(self, *, wait: bool = True) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=wait)
        if self._mesh.device.type == "cuda" and self._plan is not None:
            unregister_host(self._host.data_ptr())
        # The thread of an abandoned save still has a view of the memory, which keeps it
        # allocated.
        self._plan = None
        self._host = torch.empty(0, dtype=torch.uint8)

    def _plan_for(self, state: ShardedState) -> RankPlan:
        self.prepare(state)
        if self._plan is None or _layout(state) != self._layout:
            raise ValueError(
                "the layout of the state changed since the first save; a new layout needs "
                "a new CheckpointWriter"
            )
        return self._plan

    def _small_files(
        self, plan: RankPlan, train_state: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> SmallFiles:
        rank_state = {}
        common_state = {}
        for key, value in train_state.items():
            if key in RANK_KEYS:
                rank_state[key] = value
            else:
                common_state[key] = value
        rank_file = rank_state_file(self._mesh.rank)
        small_files = [(rank_file, json.dumps(rank_state).encode())]
        if plan.index is not None:
            small_files += files.items()
            small_files.append((TRAIN_STATE, json.dumps(common_state).encode()))
            # Written last: a commit checks for this file to know that the common part is
            # complete.
            small_files.append((INDEX, plan.index))
        return small_files

    def _try_to_write(self, save: _Save) -> None:
        """Writes a save, or reports why it failed. Raises the error that ends the run."""
        try:
            self._write(save)
        except StorageError as error:
            now = time.monotonic()
            self._failed = self._failed.with_another(now)
            if self._on_failed is None or self._failed.ends_run(now):
                raise
            self._unwritten = save
            # Now and not at the next save, which may be an hour away.
            self._on_failed(CheckpointFailedReport(save.step, save.path, str(error)))
        else:
            self._failed = FailedSaves()

    def _write(self, save: _Save) -> None:
        # Waits in this thread, so that the training thread continues while the copies
        # finish.
        if save.copied is not None:
            save.copied.synchronize()
        files = DigestedFiles(open_storage(save.path))
        memory = self._host.numpy().data
        with files.open_output(data_file(self._mesh.rank)) as file:
            for position in range(0, len(memory), BLOCK_BYTES):
                # Inside the context, so that after an error the file never appears.
                if self._abandoned.is_set():
                    raise WriteAbandonedError
                file.write(memory[position : position + BLOCK_BYTES])
        num_bytes = len(memory)
        for name, content in save.small_files:
            files.write_bytes_atomic(name, content)
            num_bytes += len(content)
        num_bytes += files.write_digests(self._mesh.rank)
        # Checked again, because an abandoned save must not be reported as durable.
        if self._abandoned.is_set():
            raise WriteAbandonedError
        seconds = time.monotonic() - save.start
        self._on_written(CheckpointReport(save.step, save.path, num_bytes, seconds))


def _layout(state: ShardedState) -> list[tuple[object, ...]]:
    """Returns the properties of a state that must not change between saves."""
    rows: list[tuple[object, ...]] = []
    for fqn, tensor in state.items():
        for local in tensor.boxes:
            rows.append((fqn, tensor.shape, local.box, local.tensor.dtype))
    return rows


def copy_to_host(
    slots: Sequence[Slot], state: ShardedState, host: torch.Tensor, device: torch.device
) -> torch.cuda.Event | None:
    """Copies boxes to their slots in host memory; on CUDA returns an event for the end.

    On CUDA the copies are queued on the current stream before later work that changes
    the memory, so the host need not wait.
    """
    for slot in slots:
        raw = host[slot.start : slot.start + slot.num_bytes]
        target = raw.view(slot.dtype).view(slot.box.size)
        target.copy_(state[slot.fqn].memory(slot.box), non_blocking=True)
    if device.type != "cuda":
        return None
    event: torch.cuda.Event = torch.cuda.current_stream(device).record_event()
    return event
