"""What every request passes first.

Owns: request ids, tokens, the size of bodies, timing. Must not know: routes.

A plain ASGI layer: it answers before anything of the body has been read, and it leaves
streams alone.
"""

import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.dependencies import Context
from service.http.errors import ProblemError, respond
from service.http.telemetry import UNKNOWN_ROUTE

logger = logging.getLogger("service.access")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestMiddleware:
    """Lets requests in; `context` is asked per request, because the service is put
    together after this layer.
    """

    def __init__(self, app: ASGIApp, context: Callable[[], Context]) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = self._context()
        began = time.monotonic()
        status = 500
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = (
            given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        )
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        try:
            try:
                state["caller"] = context.auth.authorize(
                    scope["path"], headers.get(b"authorization")
                )
                limited = _limited(scope, headers, receive, context)
            except ProblemError as error:
                await respond(error, scope["path"], request_id)(scope, receive, send_marked)
            else:
                await self._app(scope, limited, send_marked)
        finally:
            seconds = time.monotonic() - began
            route = _template(scope)
            context.telemetry.observe(
                scope["method"],
                route,
                status,
                seconds,
                waits=route.endswith(("/stream", "/desired")),
            )
            logger.debug(
                "%s %s %s %d %.3fs",
                request_id,
                scope["method"],
                scope["path"],
                status,
                seconds,
            )


def _limited(
    scope: Scope, headers: dict[bytes, str], receive: Receive, context: Context
) -> Receive:
    """Refuses a body that is, or turns out to be, too large."""
    settings = context.settings
    most = (
        settings.max_internal_body_bytes
        if scope["path"].startswith("/internal/")
        else settings.max_body_bytes
    )
    error = ProblemError("body_too_large", f"a body may have {most} bytes here; send less")
    length = headers.get(b"content-length", "0")
    if not length.isdigit() or int(length) > most:
        raise error
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise error
        return message

    return counted


def _template(scope: Scope) -> str:
    """The matched route as written in the code: what a caller sends never becomes a
    label.
    """
    return str(getattr(scope.get("route"), "path", UNKNOWN_ROUTE))
