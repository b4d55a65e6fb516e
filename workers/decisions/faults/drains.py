"""Decides what a running attempt does when its nodes are about to go.

Owns: which ranks are concerned, how long they may take to save, and that failures of such
nodes are preemptions. Pure: times come in as values. Must not know: Ray, torch, clocks.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from workers.decisions.failures import Failure, FailureKind
from workers.decisions.observations import AttemptFailed
from workers.decisions.placement import RankPlace

MARGIN_S = 3.0
"""Seconds before a node's end by which its ranks must have stopped: the checkpoint is
committed and the processes are ended in them."""
_NODE_FAILURES = (
    FailureKind.COLLATERAL,
    FailureKind.NODE_LOST,
    FailureKind.PROCESS_DIED,
    FailureKind.SILENT,
)
"""Failures that the end of a node explains."""


@dataclass(frozen=True)
class Drain:
    """Nodes of an attempt that are about to go."""

    nodes: Mapping[str, str]
    """Addresses by node id."""
    ranks: tuple[int, ...]
    """The ranks on these nodes."""
    deadline: float | None
    """When the first node goes, by the driver's clock; None: not known."""
    stop_by: float
    """When ranks that have not stopped are ended."""

    def sentence(self, now: float) -> str:
        """Returns the drain as a line of the history."""
        when = "soon"
        if self.deadline is not None:
            when = f"in {max(0.0, self.deadline - now):.0f} s"
        return (
            f"{self._subject()} about to go ({when}): the ranks save a checkpoint after this "
            "step and start again elsewhere"
        )

    def cause(self) -> Failure:
        """Returns the drain as the cause of an attempt's end."""
        return Failure(FailureKind.PREEMPTED, f"{self._subject()} being drained")

    def _subject(self) -> str:
        addresses = sorted(self.nodes.values())
        if len(addresses) == 1:
            return f"node {addresses[0]} is"
        return f"nodes {', '.join(addresses)} are"


def find_drain(
    deadlines: Mapping[str, float | None],
    places: Sequence[RankPlace],
    now: float,
    grace_s: float,
) -> Drain | None:
    """Returns the drain that concerns an attempt; None: its nodes stay.

    `deadlines` are those of all nodes that are being drained, by node id, by the same
    clock as `now`; `grace_s` is the time to stop where there is no deadline.
    """
    nodes = {}
    ranks = []
    for place in places:
        if place.node_id in deadlines:
            nodes[place.node_id] = place.address
            ranks.append(place.rank)
    if not nodes:
        return None
    deadline = None
    for node_id in nodes:
        node_deadline = deadlines[node_id]
        if node_deadline is not None:
            deadline = min(deadline or node_deadline, node_deadline)
    stop_by = now + grace_s
    if deadline is not None:
        stop_by = deadline - MARGIN_S
    return Drain(nodes, tuple(ranks), deadline, stop_by)


def attribute(drain: Drain, failed: AttemptFailed) -> AttemptFailed:
    """Returns a failure during a drain, as a preemption if the drain explains it."""
    cause = failed.cause
    on_node = cause.rank is None or cause.rank in drain.ranks
    if cause.kind is FailureKind.PREEMPTED or not on_node:
        return failed
    if cause.kind not in _NODE_FAILURES:
        return failed
    message = f"{drain.cause().message}: {cause.message}"
    return replace(
        failed, cause=replace(cause, kind=FailureKind.PREEMPTED, message=message)
    )


def stopped_for(drain: Drain, *, forced: bool) -> AttemptFailed:
    """Returns the end of an attempt whose ranks stopped for a drain.

    `forced`: some did not stop in time.
    """
    cause = drain.cause()
    dead: Collection[int] = ()
    if forced:
        message = f"{cause.message}, and its ranks did not save a checkpoint in time"
        cause = replace(cause, message=message)
        dead = drain.ranks
    return AttemptFailed(cause, tuple(dead))
