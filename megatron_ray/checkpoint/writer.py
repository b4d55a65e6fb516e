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
from typing import Any, Literal

import torch

from megatron_ray.checkpoint.digests import DigestedFiles
from megatron_ray.checkpoint.directory import INDEX
from megatron_ray.checkpoint.index import RankPlan, Slot, data_file, plan_save
from megatron_ray.checkpoint.train_state import TRAIN_STATE, rank_state_file
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.exceptions import MegatronRayError
from megatron_ray.reports import CheckpointReport
from megatron_ray.sharding.sharded_state import ShardedState
from megatron_ray.storage.storage import open_storage

BLOCK_BYTES = 16 * 1024 * 1024
RANK_KEYS = ("rng",)
"""Keys of the train state that differ between ranks."""

SmallFiles = list[tuple[str, bytes]]
"""Name and content, in the order in which they are written."""


class WriteAbandonedError(MegatronRayError):
    """The save was abandoned; its files never become part of a committed checkpoint."""


class CheckpointWriter:
    """Writes this rank's part of every checkpoint of a run.

    `on_written` is called when the rank's part is durable, in `async` mode from the
    writing thread. `prepare`, a collective, fixes the layout of the state (names,
    boxes, dtypes).
    """

    def __init__(
        self,
        mesh: ParallelMesh,
        mode: Literal["async", "sync"],
        on_written: Callable[[CheckpointReport], None],
    ) -> None:
        self._mesh = mesh
        self._on_written = on_written
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
        self.wait()
        start = time.monotonic()
        plan = self._plan_for(state)
        copied = copy_to_host(plan.slots, state, self._host, self._mesh.device)
        # Serialized before `save` returns, because the caller may then change its state.
        small_files = self._small_files(plan, train_state, files or {})
        if self._executor is None:
            self._write(step, path, small_files, copied, start)
        else:
            self._pending = self._executor.submit(
                self._write, step, path, small_files, copied, start
            )

    def wait(self) -> None:
        """Blocks until the last save is durable. Raises the error that ended it, once."""
        # Cleared before reading the result, so that an error is raised only once.
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

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

    def _write(
        self,
        step: int,
        path: str,
        small_files: SmallFiles,
        copied: torch.cuda.Event | None,
        start: float,
    ) -> None:
        # Waits in this thread, so that the training thread continues while the copies
        # finish.
        if copied is not None:
            copied.synchronize()
        files = DigestedFiles(open_storage(path))
        memory = self._host.numpy().data
        with files.open_output(data_file(self._mesh.rank)) as file:
            for position in range(0, len(memory), BLOCK_BYTES):
                # Inside the context, so that after an error the file never appears.
                if self._abandoned.is_set():
                    raise WriteAbandonedError
                file.write(memory[position : position + BLOCK_BYTES])
        num_bytes = len(memory)
        for name, content in small_files:
            files.write_bytes_atomic(name, content)
            num_bytes += len(content)
        num_bytes += files.write_digests(self._mesh.rank)
        # Checked again, because an abandoned save must not be reported as durable.
        if self._abandoned.is_set():
            raise WriteAbandonedError
        self._on_written(CheckpointReport(step, path, num_bytes, time.monotonic() - start))


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


def allocate_host(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Returns host memory for copies, page-locked where they come from CUDA.

    Raises MemoryError when it cannot be page-locked.
    """
    # Filled with zeros, so that the first save does not wait for page faults.
    memory = torch.empty(num_bytes, dtype=torch.uint8).zero_()
    if device.type == "cuda" and num_bytes:
        # Registered and not `pin_memory`, whose allocator rounds up to a power of two.
        status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0))
        if status:
            raise MemoryError(
                f"cannot page-lock {num_bytes} bytes of host memory for checkpoints (CUDA "
                f"error {status})"
            )
    return memory


def unregister_host(address: int) -> None:
    """Ends the page-locking of memory from `allocate_host`; 0 is the address of none."""
    if address:
        torch.cuda.cudart().cudaHostUnregister(address)
