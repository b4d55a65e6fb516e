"""Serves /v1/cluster: Ray clusters as their agents last reported them."""

from fastapi import APIRouter, Depends

from service.api import render
from service.api.cluster_models import Cluster
from service.api.models import Page
from service.http.dependencies import ContextDep
from service.http.parameters import check_query
from service.store.schema import ClusterRow

router = APIRouter(prefix="/v1", tags=["clusters"], dependencies=[Depends(check_query)])


@router.get("/cluster")
def list_clusters(context: ContextDep) -> Page[Cluster]:
    """Lists all configured clusters with their agents, nodes and drivers.

    A cluster that is made for one job is listed while its agent is live.
    """
    lasting = context.settings.lasting_clusters
    names = dict.fromkeys((*lasting, *context.agents.live_clusters()))
    clusters = []
    with context.store.read() as session:
        for name in names:
            row = session.get(ClusterRow, name)
            clusters.append(render.cluster(name, row, context.agents))
    return render.page(clusters, lambda cluster: cluster.name, total=len(clusters))
