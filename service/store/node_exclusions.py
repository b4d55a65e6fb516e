"""Keeps the list of nodes on which no rank may start.

Owns: the list of each cluster, and its marks on the agent's report, from which queue,
plans and pages read them. Must not know: HTTP, jobs' states.

An entry lasts until a user removes it or its node is gone: Ray never uses a node's id
again. Ranks that run on the node stay there until their attempt ends. Callers lock the
cluster's row, and announce a change to its agent.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.exceptions import NotFoundError, RequestInvalidError
from service.store.schema import ClusterRow, NodeExclusionRow
from workers.protocol.wire import AgentReport, NodeInfo

ADMIN = "admin"
_MAX_REASON_CHARS = 1000
_MIN_PREFIX_CHARS = 6
"""Characters of a node's id that are taken for it."""


@dataclass(frozen=True)
class NodeExclusion:
    """An entry of a cluster's list."""

    node_id: str
    address: str
    reason: str
    since: float
    """When it was excluded, in seconds since the epoch."""
    by: str
    """Id of the job whose failure excluded it, or `admin`."""


def excluded_nodes(session: Session, cluster: str) -> tuple[NodeExclusion, ...]:
    """Returns a cluster's list, oldest entry first."""
    statement = (
        sa.select(NodeExclusionRow)
        .where(NodeExclusionRow.cluster == cluster)
        .order_by(NodeExclusionRow.since, NodeExclusionRow.node_id)
    )
    entries = []
    for row in session.scalars(statement):
        entries.append(
            NodeExclusion(
                node_id=row.node_id,
                address=row.address,
                reason=row.reason,
                since=row.since,
                by=row.by,
            )
        )
    return tuple(entries)


def exclude(session: Session, row: ClusterRow, node: str, reason: str) -> None:
    """Adds a node, named by its id, the start of its id or its address.

    An entry for the same node gets the new reason. Raises RequestInvalidError.
    """
    _add(session, row, _find(_nodes(row), node), reason, ADMIN)


def exclude_for_job(
    session: Session, row: ClusterRow, job_id: str, data: Mapping[str, Any]
) -> bool:
    """Adds a node on which a job has failed, unless it is listed or gone.

    `data` are those of the driver's event. Returns whether the node was added.
    """
    node_id = str(data.get("node_id"))
    if session.get(NodeExclusionRow, (row.name, node_id)) is not None:
        return False
    reason = str(data.get("reason", ""))[:_MAX_REASON_CHARS]
    for node in _nodes(row):
        if node.node_id == node_id and node.alive:
            _add(session, row, node, reason, job_id)
            return True
    return False


def include(session: Session, row: ClusterRow, node: str) -> None:
    """Removes a node from the list, named as in `exclude`.

    Raises NotFoundError.
    """
    for entry in excluded_nodes(session, row.name):
        if _is_named(entry, node):
            session.delete(session.get_one(NodeExclusionRow, (row.name, entry.node_id)))
            session.flush()
            _mark(session, row)
            return
    raise NotFoundError.of_field(
        "/path/node", "not_excluded", f"node {node[:80]!r} is not excluded"
    )


def forget_lost(session: Session, report: AgentReport) -> None:
    """Removes the entries of nodes that are not alive any more."""
    alive = {node.node_id for node in report.nodes if node.alive}
    for entry in excluded_nodes(session, report.cluster):
        if entry.node_id not in alive:
            row = session.get_one(NodeExclusionRow, (report.cluster, entry.node_id))
            session.delete(row)
    session.flush()


def marked(session: Session, report: AgentReport) -> AgentReport:
    """Returns an agent's report with the list in it."""
    reasons = {}
    for entry in excluded_nodes(session, report.cluster):
        reasons[entry.node_id] = entry.reason
    nodes = []
    for node in report.nodes:
        excluded = reasons.get(node.node_id)
        nodes.append(node.model_copy(update={"excluded": excluded}))
    return report.model_copy(update={"nodes": tuple(nodes)})


def _add(session: Session, row: ClusterRow, node: NodeInfo, reason: str, by: str) -> None:
    entry = NodeExclusionRow(cluster=row.name, node_id=node.node_id, address=node.address)
    entry.reason = reason
    entry.since = time.time()
    entry.by = by
    session.merge(entry)
    session.flush()
    _mark(session, row)


def _mark(session: Session, row: ClusterRow) -> None:
    """Brings a stored report up to date."""
    assert row.report is not None
    report = marked(session, AgentReport.model_validate(row.report))
    row.report = report.model_dump(mode="json")
    session.flush()


def _nodes(row: ClusterRow) -> tuple[NodeInfo, ...]:
    if row.report is None:
        return ()
    return AgentReport.model_validate(row.report).nodes


def _find(nodes: Sequence[NodeInfo], name: str) -> NodeInfo:
    """Returns the living node of a name. Raises RequestInvalidError."""
    alive = [node for node in nodes if node.alive]
    named = [node for node in alive if _is_named(node, name)]
    if len(named) == 1:
        return named[0]
    detail = f"no living node has the id or address {name[:80]!r}"
    if named:
        ids = ", ".join(node.node_id for node in named)
        detail = f"{len(named)} nodes are named {name[:80]!r}; name one by its id: {ids}"
    elif alive:
        addresses = ", ".join(sorted({node.address for node in alive}))
        detail = f"{detail}; there are {addresses}"
    raise RequestInvalidError.of_field("/node", "no_node", detail)


def _is_named(node: NodeInfo | NodeExclusion, name: str) -> bool:
    is_prefix = len(name) >= _MIN_PREFIX_CHARS and node.node_id.startswith(name)
    return node.address == name or node.node_id == name or is_prefix
