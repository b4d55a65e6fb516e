"""Decides which nodes the next attempt of a job avoids.

Owns: which failures speak against their node. Pure. Must not know: Ray, torch, who keeps
the list of a cluster.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from workers.decisions.failures import Failure, FailureKind
from workers.decisions.placement import RankPlace
from workers.decisions.preflight.verdict import BlamedNode
from workers.decisions.ranks.stragglers import SlowRank

_MAX_LINE_CHARS = 200


@dataclass(frozen=True)
class BadNode:
    """A node on which an attempt has failed."""

    node_id: str
    address: str
    reason: str
    is_listed: bool
    """Whether other jobs avoid it too, until a user removes it from the cluster's list."""


def bad_nodes(
    cause: Failure, places: Sequence[RankPlace], dead_ranks: Collection[int]
) -> tuple[BadNode, ...]:
    """Returns the nodes that a failure speaks against."""
    if cause.kind is FailureKind.GPU:
        failed = [place for place in places if place.rank == cause.rank]
        return _unique(failed, cause.sentence(), is_listed=True)
    if cause.kind is FailureKind.RECHECK:
        rank = cause.facts["rank"]
        suspect = [place for place in places if place.rank == rank]
        reason = f"rank {rank} there may have computed step {cause.facts['step']} wrongly"
        return _unique(suspect, reason, is_listed=False)
    if cause.kind is FailureKind.SILENT:
        # Ray itself will count the node as lost, or it answers again: no entry of a list.
        silent = [place for place in places if place.rank in dead_ranks]
        answering = {place.node_id for place in places if place.rank not in dead_ranks}
        gone = [place for place in silent if place.node_id not in answering]
        return _unique(gone, "it does not answer", is_listed=False)
    return ()


def slow_nodes(
    slow: Iterable[SlowRank], places: Sequence[RankPlace]
) -> tuple[BadNode, ...]:
    """Returns the nodes of ranks that are slower than their peers."""
    place_of = {place.rank: place for place in places}
    nodes: tuple[BadNode, ...] = ()
    for rank in slow:
        place = place_of[rank.rank]
        reason = f"rank {rank.rank} there was {rank.ratio:.1f} times as slow as its peers"
        nodes += _unique([place], reason, is_listed=True)
    return tuple({node.node_id: node for node in nodes}.values())


def faulty_node(node_id: str, address: str, step: int) -> BadNode:
    """Returns the node on which a step was computed wrongly, each time."""
    reason = f"step {step}, computed there twice, broke a rule that it keeps elsewhere"
    return BadNode(node_id, address, reason, is_listed=True)


def measured_nodes(blamed: Iterable[BlamedNode]) -> tuple[BadNode, ...]:
    """Returns the nodes that were bad in the measurements before training."""
    nodes = []
    for node in blamed:
        reason = f"pre-flight: {node.reason}"
        nodes.append(BadNode(node.node_id, node.address, reason, is_listed=True))
    return tuple(nodes)


def node_of_defects(place: RankPlace, lines: Sequence[str]) -> BadNode:
    """Returns the node whose kernel has reported defects of a GPU."""
    reason = f"its kernel reported: {lines[0][:_MAX_LINE_CHARS]}"
    if len(lines) > 1:
        reason = f"{reason} and {len(lines) - 1} more"
    return BadNode(place.node_id, place.address, reason, is_listed=True)


def _unique(
    places: Iterable[RankPlace], reason: str, *, is_listed: bool
) -> tuple[BadNode, ...]:
    nodes = {}
    for place in places:
        nodes[place.node_id] = BadNode(place.node_id, place.address, reason, is_listed)
    return tuple(nodes.values())
