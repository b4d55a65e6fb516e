"""Reading a checkpoint into live memory, whatever layout wrote it. Owns: overlaps, bounded reads, the run's saved progress.

Every rank reads by itself what it needs; there is no collective. Must not know: optimizers, models.
"""

import json
from collections import defaultdict
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ray.checkpoint.directory import CheckpointError, check_format_version, read_manifest
from megatron_ray.checkpoint.index import SavedTensor, Slot, read_index
from megatron_ray.checkpoint.sharded_state import ShardedState, ShardedTensor
from megatron_ray.checkpoint.storage import Readable, open_storage

SCRATCH_BYTES = 16 * 1024 * 1024
TRAIN_STATE = "train_state.json"
TOKENIZER = "tokenizer.json"
"""Put beside the tensors by a run that trains on text, so that a checkpoint can speak by itself."""


def rank_state_file(rank: int) -> str:
    """What only one rank knows, inside a checkpoint."""
    return f"train_state/rank-{rank:05d}.json"


def load_into(path: str, state: ShardedState) -> None:
    """Fills every box of `state`, converting dtypes where they differ; tensors of the checkpoint not asked for are left out.

    Raises CheckpointError when the checkpoint is not committed, torn, newer, or lacks a tensor or has it in another shape.
    """
    read_manifest(path)
    storage = open_storage(path)
    saved = read_index(storage, path)
    work: dict[str, list[tuple[Slot, ReadItem, torch.Tensor]]] = defaultdict(list)
    for fqn, wanted in state.items():
        for slot, file, item, target in _reads(path, fqn, saved.get(fqn), wanted):
            work[file].append((slot, item, target))
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8)
    for file, reads in work.items():
        with storage.open_input(file) as source:
            for slot, item, target in sorted(reads, key=lambda read: read[0].start):
                _read(source, slot, item, target, scratch)


def read_train_state(path: str, rank: int) -> dict[str, Any]:
    """What the run saved beside the tensors, with this rank's own part (`rng`) where the saving layout had such a rank.

    Raises CheckpointError as `load_into` does.
    """
    files = read_manifest(path)["files"]
    storage = open_storage(path)
    parts = [TRAIN_STATE, rank_state_file(rank)] if rank_state_file(rank) in files else [TRAIN_STATE]
    state: dict[str, Any] = {}
    for part in parts:
        try:
            state.update(json.loads(storage.read_bytes(part)))
        except (json.JSONDecodeError, TypeError, ValueError) as error:
            raise CheckpointError("load", path, f"{part} is not readable: {error}") from error
    check_format_version(path, state)
    return state


def _reads(path: str, fqn: str, saved: SavedTensor | None, wanted: ShardedTensor) -> list[tuple[Slot, str, ReadItem, torch.Tensor]]:
    """Overlaps of what is wanted with what was saved."""
    if saved is None:
        raise CheckpointError("load", path, f"it has no tensor {fqn!r}: it was saved from another model")
    if saved.shape != wanted.shape:
        raise CheckpointError("load", path, f"its tensor {fqn!r} has shape {saved.shape}, the model needs {wanted.shape}")
    chunks = [ChunkStorageMetadata(torch.Size(slot.offset), torch.Size(slot.size)) for slot in saved.slots]
    metadata = TensorStorageMetadata(TensorProperties(dtype=saved.slots[0].dtype), torch.Size(saved.shape), chunks)
    items = create_read_items_for_chunk_list(fqn, metadata, wanted.__create_chunk_list__())
    missing = sum(held.box.num_elements for held in wanted.held()) - sum(prod(item.lengths) for item in items)
    if missing:
        raise CheckpointError("load", path, f"its tensor {fqn!r} lacks {missing} elements of the boxes asked for")
    found = {slot.offset: position for position, slot in enumerate(saved.slots)}
    reads = []
    for item in items:
        position = found[tuple(item.storage_index.offset or ())]
        target = wanted.__get_tensor_shard__(item.dest_index)
        for dim, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        reads.append((saved.slots[position], saved.files[position], item, target))
    return reads


def _read(source: Readable, slot: Slot, item: ReadItem, target: torch.Tensor, scratch: torch.Tensor) -> None:
    """Whole rows go straight into the target's memory, everything else through `scratch`, some rows at a time."""
    sizes, offsets, lengths = (slot.size or (1,), item.storage_offsets or (0,), item.lengths or (1,))
    target = target.reshape(1) if target.dim() == 0 else target
    row_bytes = prod(sizes[1:]) * slot.dtype.itemsize
    first = slot.start + offsets[0] * row_bytes
    in_place = target.dtype == slot.dtype and target.device.type == "cpu" and target.is_contiguous()
    if in_place and tuple(lengths[1:]) == tuple(sizes[1:]):
        source.read_into(first, _memory(target))
        return
    if row_bytes > scratch.numel():
        scratch = torch.empty(row_bytes, dtype=torch.uint8)
    step = scratch.numel() // row_bytes
    for row in range(0, lengths[0], step):
        count = min(step, lengths[0] - row)
        raw = scratch[: count * row_bytes]
        source.read_into(first + row * row_bytes, _memory(raw))
        block = raw.view(slot.dtype).view(count, *sizes[1:])
        for dim in range(1, len(sizes)):
            block = block.narrow(dim, offsets[dim], lengths[dim])
        target.narrow(0, row, count).copy_(block)


def _memory(tensor: torch.Tensor) -> memoryview:
    """Bytes of a contiguous CPU tensor of any dtype."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
