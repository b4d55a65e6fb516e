"""Plans the location of each box of each logical tensor in a checkpoint's files.

Owns: which rank writes which box, file offsets, index.json. Must not know: staging,
threads.

Planning is collective but happens once per layout. The plan fixes the part of every
rank, so the background thread that writes needs no collective.
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
    DamagedCheckpointError,
    check_format_version,
)
from megatron_ray.checkpoint.integrity.digests import CheckedFiles
from megatron_ray.distributed.collectives import Group
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.sharded_state import ShardedState

_ALIGNMENT = 64
"""Alignment in bytes, so that a reader can memory-map any dtype."""
_MAX_DEFECTS_SHOWN = 5

Shape = tuple[int, ...]


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
class BoxSpec:
    """A box of a logical tensor that a rank has in memory; replicas are equal."""

    fqn: str
    shape: Shape
    """Shape of the logical tensor."""
    box: Box
    dtype: torch.dtype


@dataclass(frozen=True)
class RankPlan:
    """The boxes that one rank writes, and their offsets in its file."""

    slots: tuple[Slot, ...]
    index: bytes | None
    """Contents of index.json, on rank 0."""

    @property
    def num_bytes(self) -> int:
        """Size of the rank's file."""
        return size_of(self.slots)


def data_file(rank: int) -> str:
    """Returns the name of a rank's file inside a checkpoint."""
    return f"data/rank-{rank:05d}.bin"


def plan_copy(state: ShardedState) -> tuple[Slot, ...]:
    """Plans the bytes of all of a rank's boxes, those that other ranks have included."""
    return _lay_out(_local_boxes(state))


def size_of(slots: Sequence[Slot]) -> int:
    """Returns the bytes that slots take up together."""
    if not slots:
        return 0
    return slots[-1].start + slots[-1].num_bytes


def plan_save(state: ShardedState, group: Group) -> RankPlan:
    """Plans this rank's file. Collective over `group`.

    Each box is written by one of the ranks that hold it, evenly distributed. Raises
    ValueError on every rank when the boxes of all ranks do not cover each tensor
    exactly.
    """
    local_boxes = _local_boxes(state)
    if group is None:
        plan = plan_all([local_boxes])[0]
    else:
        plan = _plan_on_first_rank(local_boxes, group)
    if isinstance(plan, str):
        raise ValueError(plan)
    return plan


def _local_boxes(state: ShardedState) -> list[BoxSpec]:
    specs = []
    for fqn, tensor in state.items():
        for local in tensor.nonempty():
            specs.append(BoxSpec(fqn, tensor.shape, local.box, local.tensor.dtype))
    return specs


def _plan_on_first_rank(
    local_boxes: list[BoxSpec], group: dist.ProcessGroup
) -> RankPlan | str:
    boxes_by_rank: list[Any] | None = None
    plans: list[RankPlan | str] | None = None
    # Once per run, and small: names and shapes only. If every rank planned for itself, all
    # boxes would have to be sent to every rank.
    if group.rank() == 0:
        boxes_by_rank = [None] * group.size()
    dist.gather_object(local_boxes, boxes_by_rank, group=group, group_dst=0)
    if boxes_by_rank is not None:
        plans = plan_all(boxes_by_rank)
    received: list[RankPlan | str] = [""]
    dist.scatter_object_list(received, plans, group=group, group_src=0)
    return received[0]


def plan_all(boxes_by_rank: Sequence[Sequence[BoxSpec]]) -> list[RankPlan | str]:
    """Returns each rank's plan, given the boxes of each rank.

    When the boxes do not cover the tensors, every rank gets the same message instead,
    because an error on rank 0 alone would leave the others waiting.
    """
    slots_by_rank = []
    for written in _without_replicas(boxes_by_rank):
        slots_by_rank.append(_lay_out(written))
    shapes: dict[str, Shape] = {}
    for boxes in boxes_by_rank:
        for spec in boxes:
            shapes[spec.fqn] = spec.shape
    message = _find_uncovered(slots_by_rank, shapes)
    if message is not None:
        return [message] * len(boxes_by_rank)
    plans: list[RankPlan | str] = []
    # Rank 0 writes the index of all ranks' files.
    index: bytes | None = _index_json(slots_by_rank, shapes)
    for slots in slots_by_rank:
        plans.append(RankPlan(slots, index))
        index = None
    return plans


def _without_replicas(boxes_by_rank: Sequence[Sequence[BoxSpec]]) -> list[list[BoxSpec]]:
    """Returns the boxes that each rank writes; each box is written once.

    Among the ranks that hold a box, the one with the fewest bytes so far writes it.
    """
    # Data-parallel replicas, tensor-parallel copies of norms and shared embeddings are all
    # equal boxes.
    ranks_by_box: dict[BoxSpec, list[int]] = {}
    for rank, boxes in enumerate(boxes_by_rank):
        for spec in boxes:
            ranks_by_box.setdefault(spec, []).append(rank)
    written_by_rank: list[list[BoxSpec]] = [[] for _ in boxes_by_rank]
    load = [0] * len(boxes_by_rank)
    # In the order in which ranks list their boxes, which is the same in every run, so that
    # the same layout yields the same files.
    for spec, ranks in ranks_by_box.items():
        writer = min(ranks, key=load.__getitem__)
        load[writer] += spec.box.num_elements * spec.dtype.itemsize
        written_by_rank[writer].append(spec)
    return written_by_rank


def _lay_out(boxes: Sequence[BoxSpec]) -> tuple[Slot, ...]:
    slots = []
    start = 0
    for spec in boxes:
        slot = Slot(spec.fqn, spec.box, spec.dtype, start)
        slots.append(slot)
        # Rounded up to the alignment; the gap is part of the host copy and is written too.
        start += -(-slot.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return tuple(slots)


def _find_uncovered(
    slots_by_rank: Sequence[Sequence[Slot]], shapes: dict[str, Shape]
) -> str | None:
    """Returns a message unless the boxes cover each tensor exactly once.

    With the right number of elements, all inside and without overlaps, none can be
    missing.
    """
    boxes_by_fqn: dict[str, list[Box]] = {fqn: [] for fqn in shapes}
    for slots in slots_by_rank:
        for slot in slots:
            boxes_by_fqn[slot.fqn].append(slot.box)
    # Defects are listed by kind: wrong counts are more informative than overlaps.
    wrong_counts = []
    outside = []
    overlapping = []
    for fqn, boxes in boxes_by_fqn.items():
        shape = shapes[fqn]
        count = _count_elements(boxes)
        if count != prod(shape):
            wrong_counts.append(f"{fqn} has {count} of {prod(shape)} elements")
        for box in boxes:
            if not _is_inside(box, shape):
                outside.append(f"{fqn} has {box} outside of {shape}")
        for box, other in overlaps(boxes, boxes):
            if box != other:
                overlapping.append(f"{fqn} has {box} and {other}, which overlap")
    defects = wrong_counts + outside + overlapping
    if not defects:
        return None
    shown = "; ".join(defects[:_MAX_DEFECTS_SHOWN])
    return f"the boxes of all ranks do not cover every tensor: {shown}"


def _count_elements(boxes: Sequence[Box]) -> int:
    count = 0
    for box in boxes:
        count += box.num_elements
    return count


def _is_inside(box: Box, shape: Shape) -> bool:
    return box.intersection(Box((0,) * len(shape), shape)) == box


def overlaps(boxes: Sequence[Box], others: Sequence[Box]) -> Iterator[tuple[Box, Box]]:
    """Yields the pairs that overlap. All boxes belong to the same tensor.

    Boxes are sorted by their first row, which avoids comparing every pair: in layers
    with thousands of boxes each has few neighbours.
    """
    ordered = sorted(others, key=_first_row)
    first_rows = [_first_row(box) for box in ordered]
    most_rows = 1
    for box in others:
        most_rows = max(most_rows, _num_rows(box))
    for box in boxes:
        # A box that starts at least `most_rows` rows above this one ends before it.
        low = bisect_right(first_rows, _first_row(box) - most_rows)
        high = bisect_left(first_rows, _first_row(box) + _num_rows(box))
        for other in ordered[low:high]:
            if box.intersection(other):
                yield box, other


def _first_row(box: Box) -> int:
    # A scalar's box has no dimension; it is one row.
    if not box.offset:
        return 0
    return box.offset[0]


def _num_rows(box: Box) -> int:
    if not box.size:
        return 1
    return box.size[0]


def _index_json(slots_by_rank: Sequence[Sequence[Slot]], shapes: dict[str, Shape]) -> bytes:
    files: dict[str, int] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for rank, slots in enumerate(slots_by_rank):
        files[data_file(rank)] = size_of(slots)
        for slot in slots:
            dtype = str(slot.dtype).removeprefix("torch.")
            # Boxes of a tensor may have been written by several ranks.
            entry = tensors.setdefault(
                slot.fqn, {"dtype": dtype, "shape": shapes[slot.fqn], "chunks": []}
            )
            entry["chunks"].append([slot.box.offset, slot.box.size, rank, slot.start])
    body = {"format_version": FORMAT_VERSION, "files": files, "tensors": tensors}
    return json.dumps(body).encode()


@dataclass(frozen=True)
class SavedTensor:
    """One logical tensor of a checkpoint."""

    shape: Shape
    slots: tuple[Slot, ...]
    files: tuple[str, ...]
    """File of each slot."""


def read_index(files: CheckedFiles, path: str) -> dict[str, SavedTensor]:
    """Returns all tensors of a checkpoint.

    Raises CheckpointError when the index is newer, DamagedCheckpointError when it is not
    readable.
    """
    try:
        body = json.loads(files.read_bytes(INDEX))
        # The version is checked first, because a newer format may have other fields.
        check_format_version(path, body)
        tensors = {}
        for fqn, entry in body["tensors"].items():
            tensors[fqn] = _saved_tensor(fqn, entry)
        files.locate_tensors(body)
        return tensors
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        cause = f"{INDEX} is not readable: {error}"
        raise DamagedCheckpointError("load", path, cause) from error


def _saved_tensor(fqn: str, entry: dict[str, Any]) -> SavedTensor:
    # getattr accepts any name in torch, so the result must be a dtype.
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{fqn}: unknown dtype {entry['dtype']!r}")
    slots = []
    files = []
    for offset, size, rank, start in entry["chunks"]:
        slots.append(Slot(fqn, Box(tuple(offset), tuple(size)), dtype, start))
        files.append(data_file(rank))
    return SavedTensor(tuple(entry["shape"]), tuple(slots), tuple(files))
