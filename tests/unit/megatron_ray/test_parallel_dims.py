"""Rank arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ray.parallel_dims import ParallelDims

sizes = st.integers(1, 4)


def test_the_published_example_of_sixteen_ranks() -> None:
    dims = ParallelDims(tp=2, dp=2, pp=4)
    assert dims.groups(("tp",)) == tuple((rank, rank + 1) for rank in range(0, 16, 2))
    assert dims.groups(("dp",))[:4] == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert dims.groups(("pp",)) == tuple((rank, rank + 4, rank + 8, rank + 12) for rank in range(4))


@given(sizes, sizes, sizes, sizes, st.permutations(["tp", "cp", "dp", "pp"]))
def test_coordinates_and_groups_agree(tp: int, cp: int, dp: int, pp: int, order: list[str]) -> None:
    dims = ParallelDims(tp, cp, dp, pp, tuple(order))
    for rank in range(dims.world_size):
        assert dims.rank_at(**dims.coordinates(rank)) == rank
    for axes in (("tp",), ("dp", "cp"), ("tp", "cp", "dp", "pp")):
        groups = dims.groups(axes)
        assert sorted(rank for group in groups for rank in group) == list(range(dims.world_size))
        assert all(group == dims.group_of(rank, axes) for group in groups for rank in group)
        assert all(len(group) == dims.size(*axes) for group in groups)


def test_dp_is_derived_from_the_world() -> None:
    assert ParallelDims.for_world(8, tp=2).dp == 4


def test_a_world_that_does_not_factor_shows_the_whole_product() -> None:
    with pytest.raises(ValueError, match=r"tp\(2\) x cp\(1\) x dp\(3\) x pp\(1\) does not make up a world of 8 ranks"):
        ParallelDims.for_world(8, tp=2, dp=3)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="tp=0 must be at least 1"):
        ParallelDims(tp=0)
    with pytest.raises(ValueError, match="must name each of"):
        ParallelDims(order=("tp", "dp"))
    with pytest.raises(ValueError, match="rank 4 is outside a world of 4"):
        ParallelDims(tp=4).coordinates(4)
