"""Thinning a series: what must be kept is kept, whatever the numbers."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from service.store.metrics import thin

Point = tuple[float | None, float | None]

value = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))


def numbers(points: list[Point], column: int) -> list[float]:
    series = [point[column] for point in points]
    return [number for number in series if number is not None]


@given(st.lists(st.tuples(value, value), min_size=1, max_size=300), st.integers(2, 60))
def test_first_last_and_extremes_stay(points: list[Point], most: int) -> None:
    kept = thin(points, most)
    assert kept == sorted(set(kept))
    assert len(kept) <= most
    assert kept[0] == 0
    assert kept[-1] == len(points) - 1
    if most >= 6:
        for column in range(2):
            known = numbers(points, column)
            if known:
                shown = numbers([points[index] for index in kept], column)
                assert min(shown) == min(known)
                assert max(shown) == max(known)


def test_short_series_are_left_alone() -> None:
    assert thin([(1.0,), (2.0,)], 2) == [0, 1]
    assert thin([], 2) == []


def test_every_stretch_is_represented() -> None:
    kept = thin([(float(i % 7),) for i in range(10_000)], 102)
    assert len(kept) > 90
    assert max(b - a for a, b in pairwise(kept)) < 400
