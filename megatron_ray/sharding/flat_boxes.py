"""Describes a flat range of a row-major tensor as n-dimensional boxes.

An optimizer shard is a range of a flattened parameter; checkpoints contain boxes of
logical tensors. A range of a 2-d tensor is at most three boxes: the rest of a row,
whole rows, the start of a row. Pure Python. Must not know: files.
"""

from dataclasses import dataclass
from math import prod

from megatron_ray.sharding.boxes import Box

FlatBox = tuple[Box, int, int]
"""A box and the flat range [start, end) that its elements occupy, in order, in the
flattened tensor."""


def flat_range_to_boxes(shape: tuple[int, ...], start: int, end: int) -> list[FlatBox]:
    """Returns boxes that cover the flat range [start, end) of a tensor of `shape`.

    They are in flat order, and at most 2 x dims - 1.

    Raises ValueError when the range is not inside the tensor.
    """
    if not 0 <= start <= end <= prod(shape):
        raise ValueError(
            f"flat range [{start}, {end}) is not inside a tensor of shape {shape}"
        )
    return _boxes(_Block(shape), start, end)


@dataclass(frozen=True)
class _Block:
    """A block of the tensor with fixed indices in its first dimensions."""

    shape: tuple[int, ...]
    """Sizes of the remaining dimensions."""
    fixed: tuple[int, ...] = ()
    """Indices in the fixed dimensions."""
    base: int = 0
    """Flat position of the block's first element."""

    def row(self, index: int) -> "_Block":
        """Returns the block with one more fixed dimension."""
        inner = self.shape[1:]
        return _Block(inner, (*self.fixed, index), self.base + index * prod(inner))


def _boxes(block: _Block, start: int, end: int) -> list[FlatBox]:
    """Covers [start, end), counted from the block's first element."""
    if start == end:
        return []
    if not block.shape:
        box = Box(block.fixed, (1,) * len(block.fixed))
        return [(box, block.base, block.base + 1)]
    # Whole rows form one box; partial rows are covered in the next dimension, so the
    # recursion depth is the number of dimensions.
    row = prod(block.shape[1:])
    first_whole = -(-start // row)
    end_whole = end // row
    if first_whole > end_whole:
        # Both ends are within one row.
        offset = end_whole * row
        return _boxes(block.row(end_whole), start - offset, end - offset)
    boxes: list[FlatBox] = []
    if start < first_whole * row:
        # The rest of the previous row.
        offset = (first_whole - 1) * row
        boxes += _boxes(block.row(first_whole - 1), start - offset, row)
    if first_whole < end_whole:
        boxes.append(_whole_rows(block, first_whole, end_whole, row))
    if end_whole * row < end:
        # The start of the next row.
        boxes += _boxes(block.row(end_whole), 0, end - end_whole * row)
    return boxes


def _whole_rows(block: _Block, first: int, end: int, row: int) -> FlatBox:
    inner = block.shape[1:]
    offset = (*block.fixed, first, *[0] * len(inner))
    size = (*[1] * len(block.fixed), end - first, *inner)
    return Box(offset, size), block.base + first * row, block.base + end * row
