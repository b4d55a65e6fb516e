"""Assembles the service as an ASGI app.

Owns: opening the components at start and closing them at the end. Must not know: the
work of routes.
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

_ROUTERS = (
    jobs.router,
    plans.router,
    events.router,
    metrics.router,
    logs.router,
    checkpoints.router,
    cluster.router,
    health.router,
    internal.router,
)


def create_app(settings: Settings) -> FastAPI:
    """Returns the app; database, tokens and key are opened when it starts, not here."""
    # Created here, not at start, because the server ends its streams before the app shuts
    # down.
    notifier = Notifier()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        notifier.attach()
        context = await run_in_threadpool(_open, settings, notifier)
        app.state.context = context
        cleaning = asyncio.create_task(idempotency.delete_regularly(context.store))
        yield
        # Streams and long polls end first, or the server would wait for them.
        notifier.close()
        cleaning.cancel()
        await run_in_threadpool(context.store.close)

    app = FastAPI(
        title="megatron-ray",
        version="1",
        description="Trains GPT-class models on Ray clusters. Errors are "
        "application/problem+json (RFC 9457).",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # Clients drop body and token when they follow a redirect.
        redirect_slashes=False,
    )
    app.state.notifier = notifier
    app.add_middleware(RequestMiddleware, context=lambda: app.state.context)
    errors.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    return app


def _open(settings: Settings, notifier: Notifier) -> Context:
    # Blocks on disk and database, so it runs in a thread.
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    store = Store.open(settings.url, notifier.notify)
    idempotency.delete_old_responses(store)
    return Context(
        settings=settings,
        store=store,
        notifier=notifier,
        agents=Agents(settings.agent_lost_s),
        auth=Authenticator.load(store, settings),
        telemetry=Telemetry(),
        deployment=store.deployment(),
    )
