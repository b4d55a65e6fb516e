"""What every route may use.

Owns: the parts of one running service, put together. Must not know: routes.
"""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from service.http.auth import Authenticator, Caller
from service.http.notifier import Notifier
from service.http.telemetry import Telemetry
from service.jobs.agents import Agents
from service.settings import Settings
from service.store.database import Store
from service.store.schema import DeploymentRow


@dataclass(frozen=True)
class Context:
    """One running service."""

    settings: Settings
    store: Store
    hub: Notifier
    agents: Agents
    auth: Authenticator
    telemetry: Telemetry
    deployment: DeploymentRow


def context_of(request: Request) -> Context:
    """The service a request came to."""
    found: Context = request.app.state.context
    return found


def caller_of(request: Request) -> Caller:
    """Who sent a request; the gate has let them in."""
    found: Caller = request.state.caller
    return found


Service = Annotated[Context, Depends(context_of)]
CurrentCaller = Annotated[Caller, Depends(caller_of)]
