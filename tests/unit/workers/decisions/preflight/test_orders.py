"""Which nodes are paired, in which order."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from workers.decisions.preflight.orders import pair_rounds, preflight_orders


@given(num_nodes=st.integers(1, 40))
def test_every_node_of_three_or_more_has_two_links_in_few_rounds(num_nodes: int) -> None:
    rounds = pair_rounds(num_nodes)
    degrees: Counter[int] = Counter()
    for pairs in rounds:
        busy = [node for pair in pairs for node in pair]
        # Each node is in one pair at a time, so a pair measures nothing but its link.
        assert len(busy) == len(set(busy))
        degrees.update(busy)
    assert len(rounds) <= 8
    if num_nodes == 1:
        assert rounds == []
    elif num_nodes == 2:
        assert rounds == [[(0, 1)]]
    else:
        assert all(degrees[node] >= 2 for node in range(num_nodes))
        neighbours = {tuple(sorted((n, (n + 1) % num_nodes))) for n in range(num_nodes)}
        assert neighbours <= {pair for pairs in rounds for pair in pairs}


@given(nodes=st.lists(st.sampled_from("abcde"), min_size=1, max_size=24))
def test_two_ranks_of_a_link_name_each_other_in_an_order_without_deadlock(
    nodes: list[str],
) -> None:
    orders = preflight_orders(nodes, 60.0)
    waiting = [list(order.peers) for order in orders]
    for rank, order in enumerate(orders):
        assert all(nodes[peer] != nodes[rank] for peer in order.peers)
        assert rank in order.node_ranks
    # Ranks take their links in order; each round some pair is at the same link.
    progress = True
    while progress:
        progress = False
        for rank, peers in enumerate(waiting):
            if peers and waiting[peers[0]][:1] == [rank]:
                waiting[peers[0]].pop(0)
                peers.pop(0)
                progress = True
    assert waiting == [[] for _ in nodes]


def test_a_rank_alone_measures_its_device_only() -> None:
    (order,) = preflight_orders(["a"], 60.0)
    assert order.parts == (("device", None),)


def test_the_parts_come_from_small_to_large() -> None:
    order = preflight_orders(["a", "a", "b", "b"], 60.0)[1]
    assert order.parts == (
        ("device", None),
        ("node", None),
        ("link", 3),
        ("world", None),
    )


def test_thousands_of_ranks_are_ordered_at_once() -> None:
    nodes = [rank // 8 for rank in range(16_384)]
    orders = preflight_orders(nodes, 60.0)
    assert max(len(order.peers) for order in orders) == 3
