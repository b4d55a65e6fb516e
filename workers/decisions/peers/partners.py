"""Decides which rank keeps the copies of another rank's state.

Owns: that rule. Pure. Must not know: Ray, torch, what is in a copy.
"""

from collections.abc import Sequence


def partners(nodes: Sequence[str]) -> tuple[int, ...]:
    """Returns the rank that keeps each rank's copy; `nodes` has each rank's node.

    Each rank is the partner of one other. It is on another node, unless one node has more
    than half of the ranks.
    """
    ranks_by_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks_by_node.setdefault(node, []).append(rank)
    ring: list[int] = []
    for ranks in ranks_by_node.values():
        ring += ranks
    # A shift by the largest node's ranks leaves every node that has at most half of them.
    shift = max(map(len, ranks_by_node.values()))
    if shift == len(ring):
        shift = 1
    partner_of = [0] * len(ring)
    for position, rank in enumerate(ring):
        partner_of[rank] = ring[(position + shift) % len(ring)]
    return tuple(partner_of)
