"""Provides routes with the running service and the caller of a request.

Owns: the parts of one running service. Must not know: routes.
"""

from dataclasses import dataclass
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Request

from service.http.auth import Authenticator, Caller
from service.http.notifier import Notifier
from service.http.telemetry import Telemetry
from service.jobs.agents import Agents
from service.jobs.storage_reads import StorageReads
from service.settings import Settings
from service.store.database import Store
from service.store.schema import DeploymentRow


@dataclass(frozen=True)
class Context:
    """The parts of one running service."""

    settings: Settings
    store: Store
    notifier: Notifier
    agents: Agents
    auth: Authenticator
    telemetry: Telemetry
    deployment: DeploymentRow
    storage_reads: StorageReads
    validation: CapacityLimiter
    """Limits the threads that validate bodies."""
    compute: CapacityLimiter
    """Limits the threads that check specs and build plans. Both are few: each thread takes
    turns with the event loop, which would come last among many."""


def context_of(request: Request) -> Context:
    """Returns the service that a request was sent to."""
    context: Context = request.app.state.context
    return context


def caller_of(request: Request) -> Caller:
    """Returns the caller that `RequestMiddleware` has identified."""
    caller: Caller = request.state.caller
    return caller


ContextDep = Annotated[Context, Depends(context_of)]
CurrentCaller = Annotated[Caller, Depends(caller_of)]
