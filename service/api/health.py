"""/healthz, /readyz, /metrics: is it alive, can it work, how much does it do."""

from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import SQLAlchemyError

from service.http.dependencies import Context, Service
from service.store.schema import ClusterRow
from workers.protocol.wire import AgentReport

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(service: Service, response: Response) -> dict[str, Any]:
    """200 while requests can be served: `ok` with every agent there, `degraded`
    without. 503 when the database does not answer.
    """
    try:
        service.store.ping()
        agents = [_agent(service, name) for name in service.settings.clusters]
    except SQLAlchemyError:
        response.status_code = 503
        return {"status": "unavailable", "database": "does not answer", "agents": []}
    whole = all(agent["ray_reachable"] for agent in agents)
    return {"status": "ok" if whole else "degraded", "database": "ok", "agents": agents}


@router.get("/metrics")
def metrics(service: Service) -> Response:
    """Prometheus text."""
    silence = {name: service.agents.silence_s(name) for name in service.settings.clusters}
    with service.store.read() as session:
        return Response(
            service.telemetry.render(session, silence), media_type=CONTENT_TYPE_LATEST
        )


def _agent(service: Context, name: str) -> dict[str, Any]:
    with service.store.read() as session:
        row = session.get(ClusterRow, name)
    report = (
        None
        if row is None or row.report is None
        else AgentReport.model_validate(row.report)
    )
    live = service.agents.is_live(name)
    nodes = sum(node.alive for node in report.nodes) if report else 0
    # An agent that loses Ray ends itself, so one that speaks and sees nodes has Ray.
    return {
        "cluster": name,
        "live": live,
        "seen_s_ago": service.agents.silence_s(name),
        "ray_reachable": live and nodes > 0,
        "nodes": nodes,
    }
