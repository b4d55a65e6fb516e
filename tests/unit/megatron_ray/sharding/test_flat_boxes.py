"""Flat ranges as boxes, against numpy's own flattening."""

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.flat_boxes import flat_range_to_boxes


@st.composite
def shapes_and_ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@given(shapes_and_ranges())
def test_boxes_hold_exactly_the_range_in_order(
    case: tuple[tuple[int, ...], int, int],
) -> None:
    shape, start, end = case
    tensor = np.arange(prod(shape)).reshape(shape)
    position = start
    boxes = flat_range_to_boxes(shape, start, end)
    for box, low, high in boxes:
        assert low == position
        slices = tuple(
            slice(offset, offset + size)
            for offset, size in zip(box.offset, box.size, strict=True)
        )
        assert tensor[slices].reshape(-1).tolist() == list(range(low, high))
        assert tensor[slices].shape == box.size
        position = high
    assert position == end
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_a_2d_range_is_three_boxes() -> None:
    assert flat_range_to_boxes((4, 10), 7, 32) == [
        (Box((0, 7), (1, 3)), 7, 10),
        (Box((1, 0), (2, 10)), 10, 30),
        (Box((3, 0), (1, 2)), 30, 32),
    ]


def test_whole_rows_are_one_box_and_nothing_is_none() -> None:
    assert flat_range_to_boxes((4, 10), 10, 40) == [(Box((1, 0), (3, 10)), 10, 40)]
    assert flat_range_to_boxes((4, 10), 12, 12) == []
    assert flat_range_to_boxes((0, 10), 0, 0) == []


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 2), (0, 41)])
def test_a_range_outside_is_refused(start: int, end: int) -> None:
    with pytest.raises(
        ValueError, match=r"flat range .* is not inside a tensor of shape \(4, 10\)"
    ):
        flat_range_to_boxes((4, 10), start, end)
