"""The service as an ASGI app.

Owns: putting the parts together at start and apart at the end. Must not know: what
routes do.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from service.api import (
    checkpoints,
    cluster,
    events,
    health,
    internal,
    jobs,
    logs,
    metrics,
    plans,
)
from service.http import errors, idempotency
from service.http.auth import Authenticator
from service.http.dependencies import Context
from service.http.middleware import RequestMiddleware
from service.http.notifier import Notifier
from service.http.telemetry import Telemetry
from service.jobs.agents import Agents
from service.settings import Settings
from service.store.database import Store


def create_app(settings: Settings) -> FastAPI:
    """The app; database, tokens and key are opened when it starts, not here."""
    hub = Notifier()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        hub.attach()
        context = await run_in_threadpool(_open, settings, hub)
        app.state.context = context
        forgetting = asyncio.create_task(idempotency.forget_regularly(context.store))
        yield
        hub.close()
        forgetting.cancel()
        await run_in_threadpool(context.store.close)

    app = FastAPI(
        title="megatron-ray",
        version="1",
        description="Trains GPT-class models on Ray clusters. Errors are application/problem+json.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.hub = hub
    app.add_middleware(RequestMiddleware, context=lambda: app.state.context)
    errors.install(app)
    for part in (
        jobs,
        plans,
        events,
        metrics,
        logs,
        checkpoints,
        cluster,
        health,
        internal,
    ):
        app.include_router(part.router)
    return app


def _open(settings: Settings, hub: Notifier) -> Context:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    store = Store.open(settings.url, hub.notify)
    idempotency.forget_old(store)
    return Context(
        settings=settings,
        store=store,
        hub=hub,
        agents=Agents(settings.agent_lost_s),
        auth=Authenticator.load(store, settings),
        telemetry=Telemetry(),
        deployment=store.deployment(),
    )
