"""Shards the parameter table into the rows of each rank under ZeRO-3.

The sharding is torch's own (torch.chunk, FSDP: Zhao et al. 2023), so that plan and
execution agree. Pure Python. Must not know: groups.
"""

from collections.abc import Iterable
from dataclasses import replace

from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.parameter_types import LocalParameter, Part


def shard_rows(
    table: Iterable[LocalParameter], rank: int, shards: int
) -> tuple[LocalParameter, ...]:
    """Returns the rows of each tensor on one of `shards` ranks.

    They are blocks of ceil(rows / shards), the last ones shorter or empty, as in
    torch.chunk. Tensors without rows on the rank are left out.
    """
    sharded = []
    for parameter in table:
        start, end = row_range(parameter.shape[0], rank, shards)
        if start < end:
            sharded.append(_rows_of_parameter(parameter, start, end))
    return tuple(sharded)


def row_range(rows: int, rank: int, shards: int) -> tuple[int, int]:
    """Returns the range of a tensor's rows on one of `shards` ranks."""
    # Equal to the sharding of torch's FSDP, whose shards use this table's buffers.
    block = -(-rows // shards)
    return min(rank * block, rows), min((rank + 1) * block, rows)


def _rows_of_parameter(parameter: LocalParameter, start: int, end: int) -> LocalParameter:
    parts = []
    for whole in parameter.parts:
        part = _rows_of_part(whole, start, end)
        if part is not None:
            parts.append(part)
    if not parts:
        # Only padding rows. Decay and reduction are read from the first part, so an empty
        # part is kept.
        parts = [_empty_part(parameter)]
    shape = (end - start, *parameter.shape[1:])
    return replace(parameter, shape=shape, parts=tuple(parts))


def _rows_of_part(part: Part, start: int, end: int) -> Part | None:
    """Returns a part's intersection with local rows [start, end), relative to `start`."""
    first = max(part.start, start)
    last = min(part.start + part.box.size[0], end)
    if first >= last:
        return None
    # From local rows to rows of the logical tensor.
    offset = (part.box.offset[0] + first - part.start, *part.box.offset[1:])
    box = Box(offset, (last - first, *part.box.size[1:]))
    return replace(part, box=box, start=first - start)


def _empty_part(parameter: LocalParameter) -> Part:
    part = parameter.parts[0]
    box = Box(part.box.offset, (0, *part.box.size[1:]))
    return replace(part, box=box, start=0)
