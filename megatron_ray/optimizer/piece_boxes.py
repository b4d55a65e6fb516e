"""Cuts pieces of flat memory into boxes of logical tensors.

Must not know: what the memory holds, the optimizer.
"""

from collections.abc import Sequence

from torch import Tensor

from megatron_ray.optimizer.partition import Piece
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.flat_boxes import flat_range_to_boxes
from megatron_ray.sharding.parameter_types import Part
from megatron_ray.sharding.sharded_state import ShardedState, ShardedTensor, TensorBox


def add_boxes(state: ShardedState, prefix: str, piece: Piece, flat: Tensor) -> None:
    """Adds the flat range of a piece to the state, as boxes of logical tensors.

    A parameter may fuse several logical tensors along dim 0; padding rows belong to none
    and are left out.
    """
    for part in piece.placed.parameter.parts:
        boxes = _part_boxes(piece, part, flat)
        if boxes:
            logical = part.logical
            empty = ShardedTensor(logical.shape, [])
            state.setdefault(prefix + logical.name, empty).boxes.extend(boxes)


def _part_boxes(piece: Piece, part: Part, flat: Tensor) -> list[TensorBox]:
    """Returns the boxes of one part in a piece, as views of the piece's memory."""
    overlap = piece.overlap(part)
    if overlap is None:
        return []
    start, end = overlap
    part_start = piece.placed.part_start(part)
    shift = part_start - piece.start
    boxes = []
    # A flat range is in general not a box, since it may start and end within a row. It is
    # split into as few boxes as possible, which are contiguous and so views.
    for box, box_start, box_end in flat_range_to_boxes(
        part.box.size, start - part_start, end - part_start
    ):
        view = flat[shift + box_start : shift + box_end].view(box.size)
        boxes.append(TensorBox(_shifted(box, part.box.offset), view))
    return boxes


def _shifted(box: Box, offset: Sequence[int]) -> Box:
    """Returns a box of a part as a box of the logical tensor."""
    shifted = []
    for part_offset, inner_offset in zip(offset, box.offset, strict=True):
        shifted.append(part_offset + inner_offset)
    return Box(tuple(shifted), box.size)
