"""Where each box of each logical tensor lies in the files of a checkpoint.

Owns: who writes what, file offsets, index.json.

Planning is collective but happens once per layout: with it every rank knows its part
for good, and the background thread that writes needs no collective. Must not know:
staging, threads.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from megatron_ray.checkpoint.directory import (
    FORMAT_VERSION,
    INDEX,
    CheckpointError,
    check_format_version,
)
from megatron_ray.distributed.collectives import Group
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.sharded_state import ShardedState
from megatron_ray.storage.storage import Storage

_ALIGNMENT = 64
"""Bytes; lets a reader map any dtype straight over the file."""


@dataclass(frozen=True)
class Slot:
    """A box in a rank's file, row-major, at a byte offset."""

    fqn: str
    box: Box
    dtype: torch.dtype
    start: int

    @property
    def num_bytes(self) -> int:
        """Bytes without alignment."""
        return self.box.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class Held:
    """A box that a rank could write."""

    fqn: str
    shape: tuple[int, ...]
    box: Box
    dtype: torch.dtype


@dataclass(frozen=True)
class RankPlan:
    """What one rank writes."""

    slots: tuple[Slot, ...]
    index: bytes | None
    """Contents of index.json, on rank 0."""

    @property
    def num_bytes(self) -> int:
        """Size of the rank's file."""
        return _end(self.slots)


def _end(slots: Sequence[Slot]) -> int:
    return slots[-1].start + slots[-1].num_bytes if slots else 0


def data_file(rank: int) -> str:
    """A rank's file inside a checkpoint."""
    return f"data/rank-{rank:05d}.bin"


def plan_save(state: ShardedState, group: Group) -> RankPlan:
    """Collective over `group`: removes replicas, spreads them evenly, lays out the
    files.

    Raises ValueError on every rank when the boxes of all ranks do not cover each tensor
    exactly.
    """
    mine = [
        Held(fqn, tensor.shape, held.box, held.tensor.dtype)
        for fqn, tensor in state.items()
        for held in tensor.nonempty()
    ]
    if group is None:
        answer = plan_all([mine])[0]
    else:
        holdings: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
        dist.gather_object(mine, holdings, group=group, group_dst=0)
        received: list[RankPlan | str] = [""]
        dist.scatter_object_list(
            received,
            plan_all(holdings) if holdings is not None else None,
            group=group,
            group_src=0,
        )
        answer = received[0]
    if isinstance(answer, str):
        raise ValueError(answer)
    return answer


def plan_all(holdings: Sequence[Sequence[Held]]) -> list[RankPlan | str]:
    """From what each rank holds, each rank's plan; or the same problem for all, so that
    none waits for the others.
    """
    slots = [_lay_out(mine) for mine in _without_replicas(holdings)]
    shapes = {held.fqn: held.shape for mine in holdings for held in mine}
    if problem := _uncovered(slots, shapes):
        return [problem] * len(holdings)
    index = _index_json(slots, shapes)
    return [RankPlan(mine, index if rank == 0 else None) for rank, mine in enumerate(slots)]


def _without_replicas(holdings: Sequence[Sequence[Held]]) -> list[list[Held]]:
    """Each box once, at whichever of its holders has the least to write so far."""
    holders: dict[Held, list[int]] = {}
    for rank, mine in enumerate(holdings):
        for held in mine:
            holders.setdefault(held, []).append(rank)
    chosen: list[list[Held]] = [[] for _ in holdings]
    load = [0] * len(holdings)
    for held, ranks in holders.items():
        writer = min(ranks, key=load.__getitem__)
        load[writer] += held.box.num_elements * held.dtype.itemsize
        chosen[writer].append(held)
    return chosen


def _lay_out(mine: Sequence[Held]) -> tuple[Slot, ...]:
    slots = []
    start = 0
    for held in mine:
        slot = Slot(held.fqn, held.box, held.dtype, start)
        slots.append(slot)
        start += -(-slot.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return tuple(slots)


def _uncovered(
    slots: Sequence[tuple[Slot, ...]], shapes: dict[str, tuple[int, ...]]
) -> str | None:
    """What is wrong when the boxes do not cover each tensor exactly once."""
    boxes: dict[str, list[Box]] = {fqn: [] for fqn in shapes}
    for mine in slots:
        for slot in mine:
            boxes[slot.fqn].append(slot.box)
    covered = {fqn: sum(box.num_elements for box in held) for fqn, held in boxes.items()}
    wrong = [
        f"{fqn} has {count} of {prod(shapes[fqn])} elements"
        for fqn, count in covered.items()
        if count != prod(shapes[fqn])
    ]
    # As many elements as there should be, all inside, and none twice: then none is
    # missing.
    wrong += [
        f"{fqn} has {box} outside of {shapes[fqn]}"
        for fqn, held in boxes.items()
        for box in held
        if not _inside(box, shapes[fqn])
    ]
    wrong += [
        f"{fqn} has {box} and {other}, which overlap"
        for fqn, held in boxes.items()
        for box, other in overlaps(held, held)
        if box != other
    ]
    return (
        f"the boxes of all ranks do not cover every tensor: {'; '.join(wrong[:5])}"
        if wrong
        else None
    )


def _inside(box: Box, shape: tuple[int, ...]) -> bool:
    return box.intersection(Box((0,) * len(shape), shape)) == box


def overlaps(boxes: Sequence[Box], others: Sequence[Box]) -> Iterator[tuple[Box, Box]]:
    """Pairs with an element in common. All are of the same tensor."""

    def row(box: Box) -> int:
        return box.offset[0] if box.offset else 0

    ordered = sorted(others, key=row)
    starts = [row(box) for box in ordered]
    tallest = max((box.size[0] for box in others if box.size), default=1)
    for box in boxes:
        low = bisect_right(starts, row(box) - tallest)
        high = bisect_left(starts, row(box) + (box.size[0] if box.size else 1))
        yield from ((box, other) for other in ordered[low:high] if box.intersection(other))


def _index_json(
    slots: Sequence[tuple[Slot, ...]], shapes: dict[str, tuple[int, ...]]
) -> bytes:
    tensors: dict[str, dict[str, Any]] = {}
    for rank, mine in enumerate(slots):
        for slot in mine:
            name = str(slot.dtype).removeprefix("torch.")
            entry = tensors.setdefault(
                slot.fqn, {"dtype": name, "shape": shapes[slot.fqn], "chunks": []}
            )
            entry["chunks"].append([slot.box.offset, slot.box.size, rank, slot.start])
    files = {data_file(rank): _end(mine) for rank, mine in enumerate(slots)}
    return json.dumps(
        {"format_version": FORMAT_VERSION, "files": files, "tensors": tensors}
    ).encode()


@dataclass(frozen=True)
class SavedTensor:
    """One logical tensor of a checkpoint."""

    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    files: tuple[str, ...]
    """File of each slot."""


def read_index(storage: Storage, path: str) -> dict[str, SavedTensor]:
    """All tensors of a checkpoint.

    Raises CheckpointError when the index is newer or not readable.
    """
    try:
        body = json.loads(storage.read_bytes(INDEX))
        check_format_version(path, body)
        return {fqn: _saved(fqn, entry) for fqn, entry in body["tensors"].items()}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError("load", path, f"{INDEX} is not readable: {error}") from error


def _saved(fqn: str, entry: dict[str, Any]) -> SavedTensor:
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{fqn}: unknown dtype {entry['dtype']!r}")
    chunks = entry["chunks"]
    slots = tuple(
        Slot(fqn, Box(tuple(offset), tuple(size)), dtype, start)
        for offset, size, _, start in chunks
    )
    return SavedTensor(
        tuple(entry["shape"]), slots, tuple(data_file(rank) for _, _, rank, _ in chunks)
    )
