"""Reading a checkpoint into live memory, whatever layout wrote it.

Owns: overlaps, bounded reads.

Every rank reads by itself what it needs; there is no collective. Must not know:
optimizers, models.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from megatron_ray.checkpoint.directory import CheckpointError, read_manifest
from megatron_ray.checkpoint.index import SavedTensor, Slot, overlaps, read_index
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.sharded_state import ShardedState, ShardedTensor
from megatron_ray.storage.storage import Readable, Storage, open_storage

SCRATCH_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Read:
    """A part of a saved box and the memory that it belongs into."""

    slot: Slot
    part: Box
    """In the logical tensor."""
    target: torch.Tensor


def load_into(path: str, state: ShardedState) -> None:
    """Fills every box of `state`, converting dtypes where they differ; tensors of the
    checkpoint not asked for are left out.

    Raises CheckpointError when the checkpoint is not committed, torn, newer, or lacks a
    tensor or has it in another shape.
    """
    SavedCheckpoint(path).load_into(state)


class SavedCheckpoint:
    """A committed checkpoint that is read several times.

    Raises CheckpointError as `load_into` does.
    """

    def __init__(self, path: str) -> None:
        read_manifest(path)
        self.path = path
        self._storage = open_storage(path)
        self.tensors = read_index(self._storage, path)

    def load_into(self, state: ShardedState) -> None:
        """Fills every box of `state`."""
        work: dict[str, list[Read]] = defaultdict(list)
        for fqn, wanted in state.items():
            for file, read in _reads(self.path, fqn, self.tensors.get(fqn), wanted):
                work[file].append(read)
        read_all(self._storage, work)


def read_all(storage: Storage, work: Mapping[str, Sequence[Read]]) -> None:
    """Carries out the reads of each file in the order of the file, through scratch
    memory of a fixed size.
    """
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8)
    for file, reads in work.items():
        with storage.open_input(file) as source:
            for read in sorted(reads, key=lambda read: read.slot.start):
                _read(source, read, scratch)


def _reads(
    path: str, fqn: str, saved: SavedTensor | None, wanted: ShardedTensor
) -> list[tuple[str, Read]]:
    """Overlaps of what is wanted with what was saved, each with its file."""
    if saved is None:
        raise CheckpointError(
            "load",
            path,
            f"it has no tensor {fqn!r}: it was saved from another model, or with that frozen",
        )
    if saved.shape != wanted.shape:
        raise CheckpointError(
            "load",
            path,
            f"its tensor {fqn!r} has shape {saved.shape}, the model needs {wanted.shape}",
        )
    slots = {
        slot.box: (file, slot) for file, slot in zip(saved.files, saved.slots, strict=True)
    }
    memory = {held.box: held.tensor.detach() for held in wanted.nonempty()}
    reads = []
    found = 0
    for box, source in overlaps(list(memory), list(slots)):
        file, slot = slots[source]
        part = box.intersection(source)
        assert part is not None
        target = memory[box]
        for dim, (offset, length) in enumerate(zip(part.offset, part.size, strict=True)):
            target = target.narrow(dim, offset - box.offset[dim], length)
        reads.append((file, Read(slot, part, target)))
        found += part.num_elements
    missing = sum(box.num_elements for box in memory) - found
    if missing:
        raise CheckpointError(
            "load",
            path,
            f"its tensor {fqn!r} lacks {missing} elements of the boxes asked for",
        )
    return reads


def _read(source: Readable, read: Read, scratch: torch.Tensor) -> None:
    """Whole rows go straight into the target's memory, everything else through
    `scratch`, some rows at a time.
    """
    slot = read.slot
    target = read.target
    sizes = slot.box.size or (1,)
    lengths = read.part.size or (1,)
    offsets = tuple(
        inner - outer
        for inner, outer in zip(read.part.offset, slot.box.offset, strict=True)
    ) or (0,)
    target = target.reshape(1) if target.dim() == 0 else target
    row_bytes = prod(sizes[1:]) * slot.dtype.itemsize
    first = slot.start + offsets[0] * row_bytes
    in_place = (
        target.dtype == slot.dtype
        and target.device.type == "cpu"
        and target.is_contiguous()
    )
    if in_place and lengths[1:] == sizes[1:]:
        source.read_into(first, bytes_of(target))
        return
    if row_bytes > scratch.numel():
        scratch = torch.empty(row_bytes, dtype=torch.uint8)
    step = scratch.numel() // row_bytes
    for row in range(0, lengths[0], step):
        count = min(step, lengths[0] - row)
        raw = scratch[: count * row_bytes]
        source.read_into(first + row * row_bytes, bytes_of(raw))
        block = raw.view(slot.dtype).view(count, *sizes[1:])
        for dim in range(1, len(sizes)):
            block = block.narrow(dim, offsets[dim], lengths[dim])
        target.narrow(0, row, count).copy_(block)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Bytes of a contiguous CPU tensor of any dtype."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
