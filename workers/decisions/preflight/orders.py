"""Decides which ranks measure what with each other, in which order.

Owns: the pairs of nodes and their rounds. Pure. Must not know: Ray, torch, how anything is
measured, what follows.

Nodes are paired with their neighbours in the ring of all nodes, where the messages of rings
go, and with the node opposite. So each of three or more nodes has two links or more,
which tell a slow node from a slow link.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PreflightOrder:
    """What one rank measures, in this order: device, node, links, world."""

    node_ranks: tuple[int, ...]
    """The ranks of its node, which reduce among themselves if there are several."""
    peers: tuple[int, ...]
    """Ranks of other nodes to exchange messages with, one after the other."""
    num_nodes: int
    """All ranks reduce together if there are several nodes."""
    timeout_s: float

    @property
    def parts(self) -> tuple[tuple[str, int | None], ...]:
        """The parts with the rank at the other end of a link."""
        parts: list[tuple[str, int | None]] = [("device", None)]
        if len(self.node_ranks) > 1:
            parts.append(("node", None))
        for peer in self.peers:
            parts.append(("link", peer))
        if self.num_nodes > 1:
            parts.append(("world", None))
        return tuple(parts)


def preflight_orders(
    nodes: Sequence[Hashable], timeout_s: float
) -> tuple[PreflightOrder, ...]:
    """Returns what each rank measures, by rank; `nodes` are the nodes of the ranks."""
    ranks_of: dict[Hashable, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks_of.setdefault(node, []).append(rank)
    # In the order of their first rank, as the rings of communicators go.
    groups = list(ranks_of.values())
    peers: list[list[int]] = [[] for _ in nodes]
    for pairs in pair_rounds(len(groups)):
        for first, second in pairs:
            # All ranks of two nodes at once, as in training. A rank more on one of them has
            # no partner.
            for left, right in zip(groups[first], groups[second], strict=False):
                peers[left].append(right)
                peers[right].append(left)
    orders = []
    for rank, node in enumerate(nodes):
        orders.append(
            PreflightOrder(
                node_ranks=tuple(ranks_of[node]),
                peers=tuple(peers[rank]),
                num_nodes=len(groups),
                timeout_s=timeout_s,
            )
        )
    return tuple(orders)


def pair_rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Returns pairs of nodes by round; a node is in at most one pair of a round."""
    pairs: dict[tuple[int, int], None] = {}
    # The neighbours first: a measurement that hangs is known by its earliest round.
    for distance in (1, num_nodes // 2):
        for node in range(num_nodes):
            other = (node + distance) % num_nodes
            if other != node:
                pairs[min(node, other), max(node, other)] = None
    rounds: list[list[tuple[int, int]]] = []
    busy: list[set[int]] = []
    for pair in pairs:
        number = 0
        while number < len(rounds) and busy[number].intersection(pair):
            number += 1
        if number == len(rounds):
            rounds.append([])
            busy.append(set())
        rounds[number].append(pair)
        busy[number].update(pair)
    return rounds
