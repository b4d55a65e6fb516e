"""Draws initial weights as a pure function of (seed, logical name, block of rows).

Each block of at most 4 Mi elements has its own generator, seeded by a hash, and a rank
draws only blocks that contain its rows. So every layout starts with the same weights,
and a rank needs memory for its shard plus one block. Must not know: layouts.
"""

import torch
from torch import Tensor

from megatron_ray.distributed.rng import generator
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.parameter_types import LocalParameter, LogicalParameter

BLOCK_ELEMENTS = 4 * 1024 * 1024


def init_local(parameter: LocalParameter, seed: int) -> Tensor:
    """Returns the fp32 initial value of a rank's (fused, padded) tensor, on CPU.

    Padding rows are zero.
    """
    value = torch.zeros(parameter.shape)
    for part in parameter.parts:
        rows = part.box.size[0]
        if rows:
            value.narrow(0, part.start, rows).copy_(draw_box(part.logical, part.box, seed))
    return value


def draw_box(logical: LogicalParameter, box: Box, seed: int) -> Tensor:
    """Returns the fp32 initial value of a box of a logical tensor, on CPU."""
    if logical.init.kind == "ones":
        return torch.ones(box.size)
    if logical.init.kind == "zeros":
        return torch.zeros(box.size)
    # Blocks are whole rows of the full tensor, so they do not depend on sharding.
    row_elements = logical.num_elements // logical.shape[0]
    block_rows = max(1, BLOCK_ELEMENTS // row_elements)
    first = box.offset[0]
    end = box.offset[0] + box.size[0]
    value = torch.empty(box.size)
    for block in range(first // block_rows, -(-end // block_rows)):
        # A whole block is drawn, because a generator produces its numbers in order only.
        block_start = block * block_rows
        drawn = _draw_block(logical, block, block_rows, seed)
        low = max(first, block_start)
        high = min(end, block_start + len(drawn))
        rows = drawn[low - block_start : high - block_start]
        for dim in range(1, len(box.size)):
            rows = rows.narrow(dim, box.offset[dim], box.size[dim])
        value[low - first : high - first] = rows
    return value


def _draw_block(
    logical: LogicalParameter, block: int, block_rows: int, seed: int
) -> Tensor:
    rows = min(block_rows, logical.shape[0] - block * block_rows)
    empty = torch.empty((rows, *logical.shape[1:]))
    source = generator(f"{seed}/{logical.name}/{block}")
    return empty.normal_(0.0, logical.init.std, generator=source)
