"""Which rows of a tensor a rank keeps where parameters themselves are sharded over
replicas.

Owns: that cut of the parameter table.

It is torch's own (torch.chunk, FSDP: Zhao et al. 2023), so what is sharded and what is
planned agree. Pure. Must not know: torch, groups.
"""

from collections.abc import Iterable
from dataclasses import replace

from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.parameter_types import LocalParameter, Part


def shard_rows(
    table: Iterable[LocalParameter], rank: int, shards: int
) -> tuple[LocalParameter, ...]:
    """The rows of each tensor that one of `shards` ranks keeps: blocks of ceil(rows /
    shards), the last ones shorter or none, as torch.chunk cuts. Tensors of which it has
    none are left out.
    """
    found = []
    for parameter in table:
        rows = parameter.shape[0]
        block = -(-rows // shards)
        start = min(rank * block, rows)
        end = min((rank + 1) * block, rows)
        if start < end:
            parts = tuple(
                part
                for whole in parameter.parts
                if (part := _rows_of(whole, start, end)) is not None
            )
            found.append(
                replace(
                    parameter,
                    shape=(end - start, *parameter.shape[1:]),
                    parts=parts or (_nothing_of(parameter),),
                )
            )
    return tuple(found)


def _rows_of(part: Part, start: int, end: int) -> Part | None:
    """What of a part lies in local rows [start, end), as a part of those."""
    low = max(part.start, start)
    high = min(part.start + part.box.size[0], end)
    if low >= high:
        return None
    box = Box(
        (part.box.offset[0] + low - part.start, *part.box.offset[1:]),
        (high - low, *part.box.size[1:]),
    )
    return replace(part, box=box, start=low - start)


def _nothing_of(parameter: LocalParameter) -> Part:
    """Only padding rows: the rules of the parameter hold, and no element means
    anything.
    """
    first = parameter.parts[0]
    return replace(first, box=Box(first.box.offset, (0, *first.box.size[1:])), start=0)
