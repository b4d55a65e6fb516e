"""Initial weights as a pure function of (seed, logical name, block of rows).

Owns: that function. Must not know: layouts.

Each block of at most 4 Mi elements has its own generator, seeded by a hash, and a rank
draws only the blocks that it owns rows of. So every layout starts equal, and no rank
ever holds more than its shard plus one block.
"""

import torch
from torch import Tensor

from megatron_ray.distributed.rng import generator
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.parameter_types import LocalParameter, LogicalParameter

BLOCK_ELEMENTS = 4 * 1024 * 1024


def init_local(parameter: LocalParameter, seed: int) -> Tensor:
    """The fp32 initial value of a rank's (fused, padded) tensor, on CPU; padding rows
    are zero.
    """
    value = torch.zeros(parameter.shape)
    for part in parameter.parts:
        rows = part.box.size[0]
        if rows:
            value.narrow(0, part.start, rows).copy_(draw_box(part.logical, part.box, seed))
    return value


def draw_box(logical: LogicalParameter, box: Box, seed: int) -> Tensor:
    """The fp32 initial value of a box of a logical tensor, on CPU."""
    if logical.init.kind != "normal":
        return torch.full(box.size, 1.0 if logical.init.kind == "ones" else 0.0)
    row_elements = logical.num_elements // logical.shape[0]
    block_rows = max(1, BLOCK_ELEMENTS // row_elements)
    first = box.offset[0]
    last = box.offset[0] + box.size[0]
    value = torch.empty(box.size)
    for block in range(first // block_rows, -(-last // block_rows)):
        start = block * block_rows
        rows = min(block_rows, logical.shape[0] - start)
        drawn = torch.empty((rows, *logical.shape[1:])).normal_(
            0.0, logical.init.std, generator=generator(f"{seed}/{logical.name}/{block}")
        )
        low = max(first, start)
        high = min(last, start + rows)
        wanted = drawn[low - start : high - start]
        for dim in range(1, len(box.size)):
            wanted = wanted.narrow(dim, box.offset[dim], box.size[dim])
        value[low - first : high - first] = wanted
    return value
