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
    assert dims.groups(("pp",)) == tuple(
        (rank, rank + 4, rank + 8, rank + 12) for rank in range(4)
    )


@given(sizes, sizes, sizes, sizes, st.permutations(["tp", "cp", "ep", "dp", "pp"]))
def test_coordinates_and_groups_agree(
    tp: int, cp: int, dp: int, pp: int, order: list[str]
) -> None:
    dims = (
        ParallelDims(tp, cp, dp, pp, order=tuple(order))
        if order[-1] == "pp"
        else ParallelDims(tp, cp, dp, order=tuple(order))
    )
    for rank in range(dims.world_size):
        assert dims.rank_at(**dims.coordinates(rank)) == rank
    for axes in (("tp",), ("dp", "cp"), ("tp", "cp", "dp", "pp")):
        groups = dims.groups(axes)
        assert sorted(rank for group in groups for rank in group) == list(
            range(dims.world_size)
        )
        assert all(group == dims.group_of(rank, axes) for group in groups for rank in group)
        assert all(len(group) == dims.size(*axes) for group in groups)


def test_dp_is_derived_from_the_world() -> None:
    assert ParallelDims.for_world(8, tp=2).dp == 4


def test_a_world_that_does_not_factor_shows_the_whole_product() -> None:
    with pytest.raises(
        ValueError,
        match=r"tp\(2\) x cp\(1\) x dp\(3\) x pp\(1\) does not make up a world of 8 ranks",
    ):
        ParallelDims.for_world(8, tp=2, dp=3)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="tp=0 must be at least 1"):
        ParallelDims(tp=0)
    with pytest.raises(ValueError, match="ep=0 must be at least 1"):
        ParallelDims(ep=0)
    with pytest.raises(
        ValueError, match="order tp-dp must name each of tp, cp, ep, dp, pp once"
    ):
        ParallelDims(order=("tp", "dp"))
    with pytest.raises(ValueError, match="rank 4 is outside a world of 4"):
        ParallelDims(tp=4).coordinates(4)


def test_the_expert_grid_lies_over_the_same_ranks() -> None:
    """Megatron's example: tp2 dp4 with ep=4: experts' ranks are neighbours, and only
    one replica of each is left.
    """
    dims = ParallelDims(tp=2, dp=4, ep=4, etp=2)
    assert dims.expert_dp == 1
    assert dims.experts.groups(("ep",)) == (
        (0, 2, 4, 6),
        (1, 3, 5, 7),
    )
    dims = ParallelDims(tp=2, dp=4, ep=4, etp=1)
    assert dims.expert_dp == 2
    assert dims.experts.groups(("ep",)) == (
        (0, 1, 2, 3),
        (4, 5, 6, 7),
    )
    assert dims.experts.groups(("edp",)) == ((0, 4), (1, 5), (2, 6), (3, 7))


@given(
    sizes,
    sizes,
    sizes,
    sizes,
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.sampled_from([1, 2, 3, 4]),
    st.permutations(["tp", "cp", "ep", "dp"]),
)
def test_both_grids_agree_on_the_stages(
    tp: int, cp: int, dp: int, pp: int, ep: int, etp: int, order: list[str]
) -> None:
    if tp * cp * dp % (ep * etp):
        with pytest.raises(ValueError, match="must divide the world"):
            ParallelDims(tp, cp, dp, pp, ep, etp, (*order, "pp"))
        return
    dims = ParallelDims(tp, cp, dp, pp, ep, etp, (*order, "pp"))
    assert dims.experts.world_size == dims.world_size
    assert all(
        dims.coordinates(rank)["pp"] == dims.experts.coordinates(rank)["pp"]
        for rank in range(dims.world_size)
    )
    assert dims.groups(("pp",)) == dims.experts.groups(("pp",))
    for rank in range(dims.world_size):
        assert dims.experts.rank_at(**dims.experts.coordinates(rank)) == rank


def test_grids_whose_stages_differ_are_refused() -> None:
    order = ("tp", "cp", "ep", "pp", "dp")
    assert ParallelDims(tp=2, dp=2, pp=2, order=order).experts.groups(("pp",)) == (
        (0, 2),
        (1, 3),
        (4, 6),
        (5, 7),
    )
    with pytest.raises(
        ValueError,
        match=r"order tp-cp-ep-pp-dp .* dp=4 and edp=2 differ; let the order end with pp",
    ):
        ParallelDims(tp=2, dp=4, pp=2, ep=2, order=order)
    with pytest.raises(
        ValueError,
        match=r"etp\(2\) x ep\(3\) x pp\(2\) = 12 must divide the world, tp\(2\) x cp\(1\) x "
        r"dp\(4\) x pp\(2\) = 16 ranks",
    ):
        ParallelDims(tp=2, dp=4, pp=2, ep=3)


def test_embedding_groups_and_context_levels() -> None:
    dims = ParallelDims(tp=2, pp=4)
    assert [dims.embedding_group_of(rank) for rank in range(8)] == [
        (0, 6),
        (1, 7),
        (2,),
        (3,),
        (4,),
        (5,),
        (0, 6),
        (1, 7),
    ]
    assert ParallelDims(tp=2).embedding_group_of(1) == (1,)
    hierarchy = ParallelDims(cp=16, cp_sizes=(2, 2, 4))
    assert hierarchy.context_levels_of(0) == ((0, 1), (0, 2), (0, 4, 8, 12))
    assert hierarchy.context_levels_of(11) == ((10, 11), (9, 11), (3, 7, 11, 15))
    assert ParallelDims(tp=2, cp=4).context_levels_of(5) == ((1, 3, 5, 7),)
    assert ParallelDims(tp=2, dp=4, zero_replicas=2).shard_levels_of(5) == ((5, 7), (1, 5))
    with pytest.raises(ValueError, match=r"zero_replicas=3 must divide dp x cp = 4 x 1"):
        ParallelDims(dp=4, zero_replicas=3)
    with pytest.raises(
        ValueError, match=r"hierarchical sizes \[2, 2\] multiply to 4, not to cp=8"
    ):
        ParallelDims(cp=8, cp_sizes=(2, 2))


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp", "dp-tp-cp-ep-pp"])
def test_replica_groups_are_grids_of_their_own(order: str) -> None:
    dims = ParallelDims(tp=2, dp=6, pp=2, replica_groups=3, order=tuple(order.split("-")))
    grid = dims.of_group
    assert (grid.dp, grid.world_size, grid.replica_groups) == (2, 8, 1)
    assert grid.of_group is grid
    for rank in range(dims.world_size):
        index = dims.replica_group_index(rank)
        place = dims.rank_in_group(rank)
        assert dims.rank_of(index, place) == rank
        others = grid.coordinates(place)
        assert dims.coordinates(rank) == others | {"dp": 2 * index + others["dp"]}
        peers = dims.sync_group_of(rank)
        assert [dims.replica_group_index(peer) for peer in peers] == [0, 1, 2]
        assert {dims.rank_in_group(peer) for peer in peers} == {place}
        assert list(peers) == sorted(peers)


def test_groups_must_divide_the_replicas_and_hold_all_experts() -> None:
    with pytest.raises(ValueError, match="replica_groups=3 must divide dp=4"):
        ParallelDims(dp=4, replica_groups=3)
    assert ParallelDims(dp=4, ep=4).expert_dp == 1
    with pytest.raises(ValueError, match="must divide the world"):
        ParallelDims(dp=4, ep=4, replica_groups=2)
