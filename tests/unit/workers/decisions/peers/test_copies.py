"""Where copies of the ranks' states are kept, and which of them a job continues from."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ray.checkpoint.records.rollbacks import Rollback
from workers.decisions.peers.copies import (
    CopyFacts,
    CopySet,
    choose_copies,
    layout_of,
)
from workers.decisions.peers.partners import partners


@given(st.lists(st.integers(1, 8), min_size=1, max_size=12))
def test_each_rank_keeps_one_copy_and_nodes_are_left_where_possible(
    sizes: list[int],
) -> None:
    nodes = [str(node) for node, size in enumerate(sizes) for _ in range(size)]
    chosen = partners(nodes)
    assert Counter(chosen) == Counter(range(len(nodes)))
    if len(nodes) > 1:
        assert all(rank != partner for rank, partner in enumerate(chosen))
    if max(sizes) * 2 <= len(nodes):
        assert all(nodes[rank] != nodes[partner] for rank, partner in enumerate(chosen))


def test_ranks_of_a_node_that_are_not_in_a_row_leave_it_too() -> None:
    assert partners(["a", "b", "a", "b"]) == (1, 0, 3, 2)


def facts(rank: int, step: int, attempt: int = 1, layout: str = "l") -> CopyFacts:
    return CopyFacts(layout=layout, attempt=attempt, step=step, rank=rank)


def test_the_newest_step_with_all_ranks_is_chosen() -> None:
    kept = {
        0: [facts(0, 20), facts(0, 30), facts(1, 20)],
        4: [facts(2, 20), facts(2, 30), facts(0, 20)],
    }
    assert choose_copies(kept, "l", 3, 1) == CopySet(attempt=1, step=20, holders=(0, 0, 4))
    behind = Rollback(attempt=1, step=30, leave_out=1, max_step=19)
    assert choose_copies(kept, "l", 3, 1, [behind]) is None
    whole = {**kept, 5: [facts(1, 30)]}
    assert choose_copies(whole, "l", 3, 1) == CopySet(attempt=1, step=30, holders=(0, 5, 4))


@pytest.mark.parametrize(
    ("copies", "world_size", "min_step"),
    [
        ([facts(0, 20), facts(1, 20)], 2, 21),
        ([facts(0, 20), facts(1, 20, attempt=2)], 2, 1),
        ([facts(0, 20), facts(1, 20, layout="other")], 2, 1),
        ([facts(0, 20)], 2, 1),
        ([], 1, 0),
    ],
    ids=["checkpoint is newer", "other attempt", "other layout", "a rank lacks", "none"],
)
def test_no_set_is_chosen_in_part(
    copies: list[CopyFacts], world_size: int, min_step: int
) -> None:
    assert choose_copies({0: copies}, "l", world_size, min_step) is None


def test_a_layout_depends_on_what_is_trained_and_on_nothing_else() -> None:
    spec = {"model": {"preset": "gpt-tiny"}, "parallel": {"tp": 2}}
    layout = layout_of(spec, {}, 2)
    assert layout_of({**spec, "priority": 3, "name": "b"}, {}, 2) == layout
    assert layout_of({**spec, "parallel": {"tp": 1}}, {}, 2) != layout
    assert layout_of(spec, {"train": [1]}, 2) != layout
    assert layout_of(spec, {}, 4) != layout
