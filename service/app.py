"""Assembles the service as an ASGI app.

Owns: opening the components at start and closing them at the end. Must not know: the
work of routes.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from anyio import CapacityLimiter
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from service.api import (
    checkpoints,
    events,
    examples,
    health,
    internal,
    jobs,
    logs,
    metrics,
)
from service.api.clusters import routes as clusters
from service.api.diagnoses import routes as diagnoses
from service.api.models import ProblemDocument, StreamEnd, StreamMetrics
from service.api.plans import routes as plans
from service.api.profiles import routes as profiles
from service.http import errors, idempotency, openapi
from service.http.auth import Authenticator
from service.http.dependencies import Context
from service.http.methods import HeadMiddleware
from service.http.middleware import RequestMiddleware
from service.http.notifier import Notifier
from service.http.telemetry import Telemetry
from service.jobs.agents import Agents
from service.jobs.storage_reads import StorageReads
from service.settings import Settings
from service.store.database import Store

COMPUTE_THREADS = 2
"""Threads that validate bodies at once; as many more build plans."""
_ROUTERS = (
    jobs.router,
    plans.router,
    events.router,
    metrics.router,
    logs.router,
    checkpoints.router,
    diagnoses.router,
    profiles.router,
    clusters.router,
    health.router,
    internal.router,
)
_TAGS = {
    "jobs": "Create, list, cancel, pause, resume and delete jobs.",
    "plans": "How a job would run, and which layouts fit. Nothing is started.",
    "history": (
        "What a job has done: events, metrics, logs, attempts, checkpoints, diagnoses, "
        "profiles."
    ),
    "clusters": "The Ray clusters that jobs run on.",
    "health": "The service itself.",
}
_DESCRIPTION = """\
Every request but those for `/healthz`, `/readyz` and this document needs a user's token:
`Authorization: Bearer <token>`. Bodies are JSON (`Content-Type: application/json`).

Every error is a problem document (RFC 9457, `application/problem+json`) with a stable `code`;
`errors` names each wrong field by JSON pointer. Unknown fields and query parameters are errors.

Lists are pages: for the next one, set `after` to `last_id` while `has_more` is true. Filters that
take several values may be repeated (`?status=queued&status=running`) or joined by commas.

A POST with an `Idempotency-Key` may be repeated: the same key gets the first response again.

HEAD is answered wherever GET is, and OPTIONS names the methods of a path."""


def create_app(settings: Settings) -> FastAPI:
    """Returns the app; database, tokens and key are opened when it starts, not here."""
    # Created here, not at start, because the server ends its streams before the app shuts
    # down.
    notifier = Notifier()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        notifier.attach()
        limiters = CapacityLimiter(COMPUTE_THREADS), CapacityLimiter(COMPUTE_THREADS)
        context = await run_in_threadpool(_open, settings, notifier, *limiters)
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
        summary="Trains GPT-class models on Ray clusters.",
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # Clients drop body and token when they follow a redirect.
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.notifier = notifier
    app.add_middleware(RequestMiddleware, context=lambda: app.state.context)
    # Added last, so it is the first: everything below sees HEAD as GET.
    app.add_middleware(HeadMiddleware)
    errors.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    # Built once, on the first request for it.
    document = functools.cache(partial(_document, app))
    app.openapi = document  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    return openapi.build_document(
        app,
        tags=_TAGS,
        requests=examples.REQUESTS,
        responses=examples.RESPONSES,
        problem=examples.PROBLEM,
        models=(ProblemDocument, StreamMetrics, StreamEnd),
    )


def _open(
    settings: Settings,
    notifier: Notifier,
    validation: CapacityLimiter,
    compute: CapacityLimiter,
) -> Context:
    # Blocks on disk and database, so it runs in a thread.
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
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
        storage_reads=StorageReads(settings.storage_timeout_s),
        validation=validation,
        compute=compute,
    )
