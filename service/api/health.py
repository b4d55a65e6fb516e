"""Serves /healthz, /readyz and /metrics."""

import asyncio
from typing import Any, Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import SQLAlchemyError

from service.api.models import Body
from service.http.dependencies import Context, ContextDep
from service.http.parameters import check_query
from service.store.schema import ClusterRow
from workers.protocol.wire import AgentReport

_ANSWER_S = 5.0
"""How long the database may take before requests count as not served."""
router = APIRouter(tags=["health"], dependencies=[Depends(check_query)])


class AgentHealth(Body):
    """One cluster's agent, as seen by the service."""

    cluster: str
    """Name of the cluster."""
    live: bool
    """Whether the agent has been in contact recently."""
    seen_s_ago: float | None
    """Seconds since the agent's last request; null before its first one."""
    ray_reachable: bool
    """Whether the agent is live and its last report has nodes."""
    nodes: int
    """Nodes that are alive."""


class Readiness(Body):
    """Whether the service can do its work."""

    status: Literal["ok", "degraded", "unavailable"]
    """`ok`; `degraded` when an agent is lost or a job's storage is silent; `unavailable`
    without the database."""
    database: str
    """`ok`, or what is wrong with it."""
    storage: str
    """`ok`, or `does not answer` while reads of a job's storage hang."""
    agents: list[AgentHealth]
    """The agents of all clusters."""


class Liveness(Body):
    """That the process runs."""

    status: Literal["ok"]
    """Always `ok`."""


@router.get("/healthz", response_model=Liveness)
async def check_health() -> dict[str, str]:
    """Answers 200 while the process runs."""
    return {"status": "ok"}


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
async def check_readiness(context: ContextDep, response: Response) -> dict[str, Any]:
    """Answers 200 while requests can be served, 503 when the database does not answer.

    `status` is `ok` when every agent is connected and reaches Ray and no storage of a job
    is silent, else `degraded`.
    """
    try:
        # In a thread, like most requests: when no thread gets free, they wait as well.
        async with asyncio.timeout(_ANSWER_S):
            agents = await run_sync(_agents, context, abandon_on_cancel=True)
    except (SQLAlchemyError, TimeoutError):
        response.status_code = 503
        return {
            "status": "unavailable",
            "database": "does not answer",
            "storage": _storage(context),
            "agents": [],
        }
    storage = _storage(context)
    status = "ok"
    if storage != "ok":
        status = "degraded"
    for agent in agents:
        # Still 200, because jobs can be submitted and read without an agent.
        if not agent["ray_reachable"]:
            status = "degraded"
    return {"status": status, "database": "ok", "storage": storage, "agents": agents}


@router.get("/metrics", response_class=PlainTextResponse)
def get_service_metrics(context: ContextDep) -> Response:
    """Returns the service's metrics in Prometheus' text format."""
    silence_s: dict[str, float | None] = {}
    for name in context.settings.lasting_clusters:
        silence_s[name] = context.agents.silence_s(name)
    with context.store.read() as session:
        text = context.telemetry.render(session, silence_s)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _storage(context: Context) -> str:
    if context.storage_reads.is_late:
        return "does not answer"
    return "ok"


def _agents(context: Context) -> list[dict[str, Any]]:
    context.store.ping()
    agents = []
    for name in context.settings.lasting_clusters:
        agents.append(_agent(context, name))
    return agents


def _agent(context: Context, name: str) -> dict[str, Any]:
    with context.store.read() as session:
        row = session.get(ClusterRow, name)
    nodes = 0
    if row is not None and row.report is not None:
        report = AgentReport.model_validate(row.report)
        for node in report.nodes:
            nodes += node.alive
    # The last report may be old: nodes count only while the agent is live.
    is_live = context.agents.is_live(name)
    # An agent that loses Ray exits, so a live one that reports nodes is connected to Ray.
    return {
        "cluster": name,
        "live": is_live,
        "seen_s_ago": context.agents.silence_s(name),
        "ray_reachable": is_live and nodes > 0,
        "nodes": nodes,
    }
