"""Answers HEAD and OPTIONS for every route, and finds the methods of a path.

Must not know: routes.
"""

import asyncio

from fastapi import Request
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")


class HeadMiddleware:
    """Answers HEAD as GET without the body, also where the body is a stream."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection; anything but HEAD is passed on."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        response = _HeadersOnly(send)
        # Responses of this version end when `receive` reports that the client has gone.
        version = {**scope["asgi"], "spec_version": "2.3"}
        # A copy, because the server reads the method again when it sends the response.
        as_get = {**scope, "method": "GET", "asgi": version}
        await self._app(as_get, response.receive, response.send)


class _HeadersOnly:
    """Sends the start of a response and ends the request there."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_body_read = False
        self._has_ended = asyncio.Event()

    async def receive(self) -> Message:
        """Returns an empty body, and then that the client has gone.

        That ends a stream, which would otherwise run for hours.
        """
        if not self._is_body_read:
            self._is_body_read = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._has_ended.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Passes the start on and drops everything after it."""
        if message["type"] != "http.response.start":
            return
        await self._send(message)
        await self._send({"type": "http.response.body", "body": b""})
        self._has_ended.set()


def allowed_methods(request: Request) -> list[str]:
    """Returns the methods of a request's path, in alphabetical order; none if unknown."""
    # Only the router knows which of several routes matches a path, so it is asked for
    # each method.
    methods = []
    for method in _METHODS:
        scope = {**request.scope, "method": method}
        matches = [route.matches(scope)[0] for route in request.app.routes]
        if Match.FULL in matches:
            methods.append(method)
    if "GET" in methods:
        methods.append("HEAD")
    if methods:
        methods.append("OPTIONS")
    return sorted(methods)
