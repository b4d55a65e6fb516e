"""Reads a checkpoint of any layout into live memory.

Owns: overlaps, bounded reads. Must not know: optimizers, models.

Every rank reads its own boxes; no collective is needed.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod

import torch

from megatron_ray.checkpoint.directory import CheckpointError, read_manifest
from megatron_ray.checkpoint.index import SavedTensor, Slot, overlaps, read_index
from megatron_ray.checkpoint.integrity.digests import CheckedFiles
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.sharded_state import ShardedState, ShardedTensor
from megatron_ray.storage.storage import Readable, open_storage

SCRATCH_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Read:
    """A part of a saved box and the memory that it is read into."""

    slot: Slot
    part: Box
    """Box of the logical tensor that is read."""
    target: torch.Tensor


def load_into(path: str, state: ShardedState) -> None:
    """Fills every box of `state`, converting dtypes where they differ.

    Tensors that are not in `state` are not read. Raises CheckpointError when the
    checkpoint is not committed, newer, or lacks a tensor or has it in another shape,
    DamagedCheckpointError when it is incomplete or has other bytes than were written.
    """
    SavedCheckpoint(path).load_into(state)


class SavedCheckpoint:
    """A committed checkpoint that is read several times.

    Raises CheckpointError as `load_into` does.
    """

    def __init__(self, path: str) -> None:
        # Raises unless the checkpoint is committed and has all its files.
        names = tuple(read_manifest(path)["files"])
        self.path = path
        self._files = CheckedFiles(open_storage(path), path, names)
        self.tensors = read_index(self._files, path)

    def load_into(self, state: ShardedState) -> None:
        """Fills every box of `state`."""
        # All reads are planned before the first one, so that an unsuitable checkpoint
        # leaves the memory unchanged.
        reads_by_file: dict[str, list[Read]] = defaultdict(list)
        for fqn, tensor in state.items():
            saved = self._saved_tensor(fqn, tensor)
            for file, read in _plan_reads(self.path, fqn, saved, tensor):
                reads_by_file[file].append(read)
        read_all(self._files.open_input, reads_by_file)

    def _saved_tensor(self, fqn: str, tensor: ShardedTensor) -> SavedTensor:
        saved = self.tensors.get(fqn)
        if saved is None:
            cause = (
                f"it has no tensor {fqn!r}: it was saved from another model, or with that "
                "frozen"
            )
            raise CheckpointError("load", self.path, cause)
        if saved.shape != tensor.shape:
            cause = f"its tensor {fqn!r} has shape {saved.shape}, the model needs {tensor.shape}"
            raise CheckpointError("load", self.path, cause)
        return saved


def read_all(
    open_input: Callable[[str], AbstractContextManager[Readable]],
    reads_by_file: Mapping[str, Sequence[Read]],
) -> None:
    """Carries out the reads of each file, through scratch memory of a fixed size."""
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8)
    for file, reads in reads_by_file.items():
        # In file order, because disks read ahead.
        ordered = sorted(reads, key=lambda read: read.slot.start)
        with open_input(file) as source:
            for read in ordered:
                _carry_out(read, source, scratch)


def _plan_reads(
    path: str, fqn: str, saved: SavedTensor, tensor: ShardedTensor
) -> list[tuple[str, Read]]:
    """Returns the overlaps of the local boxes with the saved ones, each with its file."""
    saved_by_box: dict[Box, tuple[str, Slot]] = {}
    for file, slot in zip(saved.files, saved.slots, strict=True):
        saved_by_box[slot.box] = (file, slot)
    memory_by_box: dict[Box, torch.Tensor] = {}
    for local in tensor.nonempty():
        memory_by_box[local.box] = local.tensor.detach()
    num_missing = 0
    for box in memory_by_box:
        num_missing += box.num_elements
    reads = []
    for box, saved_box in overlaps(list(memory_by_box), list(saved_by_box)):
        file, slot = saved_by_box[saved_box]
        part = box.intersection(saved_box)
        assert part is not None
        reads.append((file, Read(slot, part, _narrow(memory_by_box[box], box, part))))
        num_missing -= part.num_elements
    # Saved boxes never overlap, so equal counts mean that everything is covered.
    if num_missing:
        cause = f"its tensor {fqn!r} lacks {num_missing} elements of the boxes asked for"
        raise CheckpointError("load", path, cause)
    return reads


def _narrow(memory: torch.Tensor, box: Box, part: Box) -> torch.Tensor:
    """Returns a view of a part of a box's memory."""
    # A view, so that reads into it fill the live memory.
    for dim in range(len(part.size)):
        memory = memory.narrow(dim, part.offset[dim] - box.offset[dim], part.size[dim])
    return memory


def _carry_out(read: Read, source: Readable, scratch: torch.Tensor) -> None:
    slot = read.slot
    target = read.target
    if target.dim() == 0:
        # A scalar is read as one row of one element.
        target = target.reshape(1)
    sizes = slot.box.size or (1,)
    lengths = read.part.size or (1,)
    row_bytes = prod(sizes[1:]) * slot.dtype.itemsize
    first = slot.start + _offsets_in_slot(read)[0] * row_bytes
    is_in_place = (
        target.dtype == slot.dtype
        and target.device.type == "cpu"
        and target.is_contiguous()
    )
    # Whole rows of the saved box are contiguous in the file as in memory.
    if is_in_place and lengths[1:] == sizes[1:]:
        source.read_into(first, bytes_of(target))
    else:
        _read_through(source, scratch, read, target)


def _read_through(
    source: Readable, scratch: torch.Tensor, read: Read, target: torch.Tensor
) -> None:
    """Reads a few whole rows of the saved box at once and copies the requested part."""
    slot = read.slot
    sizes = slot.box.size or (1,)
    lengths = read.part.size or (1,)
    offsets = _offsets_in_slot(read)
    row_bytes = prod(sizes[1:]) * slot.dtype.itemsize
    first = slot.start + offsets[0] * row_bytes
    # A row of an embedding or a large expert box may be wider than the scratch memory.
    if row_bytes > scratch.numel():
        scratch = torch.empty(row_bytes, dtype=torch.uint8)
    rows_at_once = scratch.numel() // row_bytes
    for row in range(0, lengths[0], rows_at_once):
        count = min(rows_at_once, lengths[0] - row)
        raw = scratch[: count * row_bytes]
        source.read_into(first + row * row_bytes, bytes_of(raw))
        # Whole rows are read although only a part of each is needed: one request instead of
        # one per row, at the cost of unused bytes.
        block = raw.view(slot.dtype).view(count, *sizes[1:])
        for dim in range(1, len(sizes)):
            block = block.narrow(dim, offsets[dim], lengths[dim])
        # Converts the dtype, and moves to the device, where they differ.
        target.narrow(0, row, count).copy_(block)


def _offsets_in_slot(read: Read) -> tuple[int, ...]:
    offsets = []
    for inner, outer in zip(read.part.offset, read.slot.box.offset, strict=True):
        offsets.append(inner - outer)
    return tuple(offsets) or (0,)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a contiguous CPU tensor of any dtype, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
