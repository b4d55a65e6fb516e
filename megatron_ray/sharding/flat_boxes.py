"""A flat range of a row-major tensor as n-dimensional boxes.

Owns: that arithmetic. Pure; must not know: torch, files.

An optimizer shard is a range of a flattened parameter; a checkpoint knows only boxes of
logical tensors. A range of a 2-d tensor is at most three: the rest of a row, whole
rows, the start of a row.
"""

from math import prod

from megatron_ray.sharding.boxes import Box

FlatBox = tuple[Box, int, int]
"""A box and the flat range [start, end) that its elements occupy, in order, in the
flattened tensor."""


def flat_range_to_boxes(shape: tuple[int, ...], start: int, end: int) -> list[FlatBox]:
    """Boxes that cover the flat range [start, end) of a tensor of `shape`, in flat
    order: at most 2 x dims - 1 of them.

    Raises ValueError when the range is not inside the tensor.
    """
    if not 0 <= start <= end <= prod(shape):
        raise ValueError(
            f"flat range [{start}, {end}) is not inside a tensor of shape {shape}"
        )
    return _boxes(shape, start, end, (), 0)


def _boxes(
    shape: tuple[int, ...], start: int, end: int, outer: tuple[int, ...], base: int
) -> list[FlatBox]:
    """`outer` are the indices of the dimensions already fixed, `base` the flat position
    of that block's first element.
    """
    if start == end:
        return []
    if not shape:
        return [(Box(outer, (1,) * len(outer)), base, base + 1)]
    row = prod(shape[1:])
    inner = shape[1:]
    # whole rows
    first = -(-start // row)
    last = end // row
    if first > last:  # both ends inside one row
        return _row(inner, start, end, outer, base, last, row)
    found = _row(inner, start, first * row, outer, base, first - 1, row)
    if first < last:
        box = Box(
            (*outer, first, *(0 for _ in inner)),
            (*(1 for _ in outer), last - first, *inner),
        )
        found.append((box, base + first * row, base + last * row))
    return found + _row(inner, last * row, end, outer, base, last, row)


def _row(
    inner: tuple[int, ...],
    start: int,
    end: int,
    outer: tuple[int, ...],
    base: int,
    index: int,
    row: int,
) -> list[FlatBox]:
    """The part [start, end) of one row."""
    if start == end:
        return []
    return _boxes(
        inner, start - index * row, end - index * row, (*outer, index), base + index * row
    )
