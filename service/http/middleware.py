"""Handles request id, token, kind and size of the body, and timing of every request.

Must not know: routes.

A plain ASGI middleware: it refuses a request before anything of its body has been read,
and it passes streams through unbuffered.
"""

import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_ray.config.errors.messages import short_value
from service.http.dependencies import Context
from service.http.errors import ProblemError, respond
from service.http.telemetry import UNKNOWN_ROUTE
from service.settings import Settings

logger = logging.getLogger("service.access")
_LENGTH = re.compile(r"[0-9]{1,18}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS_WITH_BODY = frozenset({"PATCH", "POST", "PUT"})
_JSON_SUFFIX = re.compile(r"application/[a-z0-9.!#$&^_-]+\+json")
_WAITING_ROUTES = ("/stream", "/desired")
"""Ends of routes that are meant to take long, so that their time means nothing."""


class RequestMiddleware:
    """Checks requests before the app handles them.

    `context` is called per request, because the service is opened after the middleware
    has been added.
    """

    def __init__(self, app: ASGIApp, context: Callable[[], Context]) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection; anything but HTTP is passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.monotonic()
        # ASGI sends names in lower case; of a header sent twice the last one counts.
        headers = _headers(scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        response = _ResponseStart(send, request_id)
        # In `finally`, because a request that fails must be counted too.
        try:
            await self._authorize_and_run(scope, headers, receive, response)
        finally:
            self._observe(scope, request_id, response.status, time.monotonic() - started_at)

    async def _authorize_and_run(
        self,
        scope: Scope,
        headers: dict[bytes, str],
        receive: Receive,
        response: "_ResponseStart",
    ) -> None:
        context = self._context()
        try:
            caller = context.auth.authorize(scope["path"], headers.get(b"authorization"))
            _check_content(scope, headers)
            limited = _limit_body(scope, headers, receive, context.settings)
        except ProblemError as error:
            # The app's exception handlers are below this layer and cannot handle it.
            refusal = respond(error, scope["path"], response.request_id)
            await refusal(scope, receive, response.send)
            return
        scope["state"]["caller"] = caller
        await self._app(scope, limited, response.send)

    def _observe(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = _route_template(scope)
        method = scope["method"]
        is_long_wait = route.endswith(_WAITING_ROUTES)
        telemetry = self._context().telemetry
        telemetry.observe(method, route, status, seconds, is_long_wait=is_long_wait)
        logger.debug(
            "%s %s %s %d %.3fs", request_id, method, scope["path"], status, seconds
        )


class _ResponseStart:
    """Adds the request id to a response and remembers the response's status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status = 500
        """500 until a response has started: the app failed without one."""

    async def send(self, message: Message) -> None:
        """Passes a message on to the client."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            header = (b"x-request-id", self.request_id.encode())
            message["headers"] = [*message.get("headers", ()), header]
        await self._send(message)


def _headers(scope: Scope) -> dict[bytes, str]:
    return {name: value.decode("latin-1") for name, value in scope["headers"]}


def _request_id(headers: dict[bytes, str]) -> str:
    """Returns the client's request id when it is safe to log, else a new one."""
    # It is logged and sent back, so it must not hold line ends or be endless.
    sent = headers.get(b"x-request-id", "")
    if _REQUEST_ID.fullmatch(sent):
        return sent
    return f"req-{secrets.token_hex(8)}"


def _check_content(scope: Scope, headers: dict[bytes, str]) -> None:
    """Raises ProblemError for a body that is no JSON by its headers.

    Agents and drivers, whose bodies are read without their headers, send JSON only.
    """
    if scope["path"].startswith("/internal/"):
        return
    has_body = headers.get(b"content-length", "0") != "0" or b"transfer-encoding" in headers
    if scope["method"] not in _METHODS_WITH_BODY or not has_body:
        return
    encoding = headers.get(b"content-encoding", "identity")
    if encoding != "identity":
        raise ProblemError(
            "unsupported_media_type",
            f"Content-Encoding {short_value(encoding)} is not supported; send the body "
            "uncompressed",
            headers={"Accept-Encoding": "identity"},
        )
    kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not _JSON_SUFFIX.fullmatch(kind):
        raise ProblemError(
            "unsupported_media_type",
            f"the body's Content-Type is {short_value(kind)}; send JSON with the header "
            "Content-Type: application/json",
            headers={"Accept": "application/json"},
        )


def _limit_body(
    scope: Scope, headers: dict[bytes, str], receive: Receive, settings: Settings
) -> Receive:
    """Returns a `receive` that refuses a body that turns out to be too large.

    Raises ProblemError at once when Content-Length is over the limit already.
    """
    limit = settings.max_body_bytes
    if scope["path"].startswith("/internal/"):
        limit = settings.max_internal_body_bytes
    error = ProblemError(
        "body_too_large", f"a request body is limited to {_size(limit)}; send less"
    )
    length = headers.get(b"content-length", "0")
    if not _LENGTH.fullmatch(length) or int(length) > limit:
        raise error
    received = 0

    async def receive_counted() -> Message:
        # A chunked body has no Content-Length, and clients may send a wrong one.
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise error
        return message

    return receive_counted


def _size(num_bytes: int) -> str:
    if num_bytes % (1 << 20) == 0:
        return f"{num_bytes >> 20} MiB"
    return f"{num_bytes} bytes"


def _route_template(scope: Scope) -> str:
    """Returns the matched route as written in the code.

    Metrics are labelled by it: labels made of what clients send would be unbounded.
    """
    return str(getattr(scope.get("route"), "path", UNKNOWN_ROUTE))
