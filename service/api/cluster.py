"""/v1/cluster: Ray clusters as their agents last saw them."""

from fastapi import APIRouter

from service.api import render
from service.api.models import Cluster, Page
from service.http.dependencies import Service
from service.store.schema import ClusterRow

router = APIRouter(prefix="/v1", tags=["cluster"])


@router.get("/cluster")
def list_clusters(service: Service) -> Page[Cluster]:
    """Every configured cluster: its agent, nodes and drivers."""
    names = service.settings.clusters
    with service.store.read() as session:
        found = [
            render.cluster(name, session.get(ClusterRow, name), service.agents)
            for name in names
        ]
    return render.page(found, list(names), has_more=False)
