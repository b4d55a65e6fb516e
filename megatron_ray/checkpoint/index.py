"""Where each box of each logical tensor lies in the files of a checkpoint. Owns: who writes what, file offsets, index.json.

Planning is collective but happens once per layout: with it every rank knows its part for good, and the background thread that
writes needs no collective. Must not know: staging, threads.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from megatron_ray.checkpoint.directory import FORMAT_VERSION, INDEX, CheckpointError, check_format_version
from megatron_ray.checkpoint.sharded_state import ShardedState
from megatron_ray.checkpoint.storage import Storage
from megatron_ray.collectives import Group

_ALIGNMENT = 64
"""Bytes; lets a reader map any dtype straight over the file."""


@dataclass(frozen=True)
class Slot:
    """A box in a rank's file, row-major, at a byte offset."""

    fqn: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def num_bytes(self) -> int:
        """Bytes without alignment."""
        return prod(self.size) * self.dtype.itemsize

    @property
    def index(self) -> MetadataIndex:
        """The box as torch.distributed.checkpoint names it."""
        return MetadataIndex(self.fqn, self.offset)


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
    """Collective over `group`: removes replicas, spreads them evenly, lays out the files. Raises ValueError on every rank when
    the boxes of all ranks do not cover each tensor exactly."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, None, is_coordinator=group is None or group.rank() == 0)
    local = planner.create_local_plan()
    if group is None:
        answer = _plan_all([local], planner)[0]
    else:
        plans: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
        dist.gather_object(local, plans, group=group, group_dst=0)
        received: list[RankPlan | str] = [""]
        dist.scatter_object_list(received, _plan_all(plans, planner) if plans is not None else None, group=group, group_src=0)
        answer = received[0]
    if isinstance(answer, str):
        raise ValueError(answer)
    return answer


def _plan_all(plans: list[SavePlan], planner: DefaultSavePlanner) -> list[RankPlan | str]:
    """Each rank's plan, or the same problem for all, so that none waits for the others."""
    try:
        final, _ = planner.create_global_plan(plans)
    except ValueError as error:
        return [str(error)] * len(plans)
    slots = [_lay_out(plan.items) for plan in final]
    shapes = {item.index.fqn: tuple(item.tensor_data.size) for plan in final for item in plan.items if item.tensor_data}
    if problem := _uncovered(slots, shapes):
        return [problem] * len(plans)
    index = _index_json(slots, shapes)
    return [RankPlan(mine, index if rank == 0 else None) for rank, mine in enumerate(slots)]


def _lay_out(items: Sequence[WriteItem]) -> tuple[Slot, ...]:
    slots, start = [], 0
    for item in items:
        assert item.tensor_data is not None  # a ShardedState holds tensors only
        chunk = item.tensor_data.chunk
        slot = Slot(item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes), item.tensor_data.properties.dtype, start)
        slots.append(slot)
        start += -(-slot.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return tuple(slots)


def _uncovered(slots: Sequence[tuple[Slot, ...]], shapes: dict[str, tuple[int, ...]]) -> str | None:
    held = dict.fromkeys(shapes, 0)
    for mine in slots:
        for slot in mine:
            held[slot.fqn] += prod(slot.size)
    wrong = [f"{fqn} has {count} of {prod(shapes[fqn])} elements" for fqn, count in held.items() if count != prod(shapes[fqn])]
    return f"the boxes of all ranks do not cover every tensor: {'; '.join(wrong[:5])}" if wrong else None


def _index_json(slots: Sequence[tuple[Slot, ...]], shapes: dict[str, tuple[int, ...]]) -> bytes:
    tensors: dict[str, dict[str, Any]] = {}
    for rank, mine in enumerate(slots):
        for slot in mine:
            name = str(slot.dtype).removeprefix("torch.")
            entry = tensors.setdefault(slot.fqn, {"dtype": name, "shape": shapes[slot.fqn], "chunks": []})
            entry["chunks"].append([slot.offset, slot.size, rank, slot.start])
    files = {data_file(rank): _end(mine) for rank, mine in enumerate(slots)}
    return json.dumps({"format_version": FORMAT_VERSION, "files": files, "tensors": tensors}).encode()


@dataclass(frozen=True)
class SavedTensor:
    """One logical tensor of a checkpoint."""

    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    files: tuple[str, ...]
    """File of each slot."""


def read_index(storage: Storage, path: str) -> dict[str, SavedTensor]:
    """All tensors of a checkpoint. Raises CheckpointError when the index is newer or not readable."""
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
    slots = tuple(Slot(fqn, tuple(offset), tuple(size), dtype, start) for offset, size, _, start in chunks)
    return SavedTensor(tuple(entry["shape"]), slots, tuple(data_file(rank) for _, _, rank, _ in chunks))
