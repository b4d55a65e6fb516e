"""Serves /v1/cluster: Ray clusters as their agents last reported them.

Also the list of nodes on which no rank may start.
"""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Path
from sqlalchemy.orm import Session

from service.api import render
from service.api.clusters.bodies import Cluster, ExcludeRequest
from service.api.models import Page
from service.exceptions import NotFoundError
from service.http.bodies import BoundedBodyRoute
from service.http.dependencies import Context, ContextDep
from service.http.parameters import check_query
from service.jobs import lifecycle, queue
from service.store import node_exclusions
from service.store.schema import ClusterRow

router = APIRouter(
    prefix="/v1",
    tags=["clusters"],
    dependencies=[Depends(check_query)],
    route_class=BoundedBodyRoute,
)
ClusterName = Annotated[str, Path(description="Name of the cluster.")]
NodeName = Annotated[
    str,
    Path(description="Id of the node, the first six or more characters, or its address."),
]


@router.get("/cluster")
def list_clusters(context: ContextDep) -> Page[Cluster]:
    """Lists all configured clusters with their agents, nodes and drivers.

    A cluster that is made for one job is listed while its agent is live.
    """
    clusters = []
    names = _names(context)
    with context.store.read() as session:
        for name in names:
            clusters.append(_cluster(context, session, name))
    return render.page(clusters, lambda cluster: cluster.name, total=len(clusters))


@router.post("/cluster/{name}/exclusions")
def exclude_node(name: ClusterName, body: ExcludeRequest, context: ContextDep) -> Cluster:
    """Excludes a node: no rank starts there any more.

    Ranks that run there stay until their attempt ends. Excluding a node again changes the
    reason.
    """

    def exclude(session: Session, row: ClusterRow) -> None:
        node_exclusions.exclude(session, row, body.node, body.reason)

    return _change(context, name, exclude)


@router.delete("/cluster/{name}/exclusions/{node}")
def include_node(name: ClusterName, node: NodeName, context: ContextDep) -> Cluster:
    """Lets ranks start on an excluded node again."""

    def include(session: Session, row: ClusterRow) -> None:
        node_exclusions.include(session, row, node)

    return _change(context, name, include)


def _change(
    context: Context, name: str, change: Callable[[Session, ClusterRow], None]
) -> Cluster:
    """Changes a cluster's list and returns the cluster. Raises NotFoundError."""
    names = _names(context)
    if name not in names:
        detail = f"no cluster {name[:80]!r}; known: {', '.join(names)}"
        raise NotFoundError.of_field("/path/name", "no_cluster", detail)
    with context.store.write() as session:
        row = lifecycle.lock_cluster(session, name)
        change(session, row)
        # The agent passes the list on to the drivers; a node more may start a queued job.
        lifecycle.raise_revision(session, name)
        queue.admit_jobs(session, row)
        session.flush()
        return _cluster(context, session, name)


def _names(context: Context) -> list[str]:
    """Returns the clusters that last, and those made for one job whose agent is live."""
    lasting = context.settings.lasting_clusters
    return list(dict.fromkeys((*lasting, *context.agents.live_clusters())))


def _cluster(context: Context, session: Session, name: str) -> Cluster:
    row = session.get(ClusterRow, name)
    excluded = node_exclusions.excluded_nodes(session, name)
    return render.cluster(name, row, context.agents, excluded)
