"""Sends server-sent events.

Owns: the form of a message, and readers that leave. Must not know: what is sent.

Written by hand, because the framework's own stream logs an error with a traceback for
every reader that leaves while a message is sent, as closed tabs do.
"""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi.sse import format_sse_event
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

MEDIA_TYPE = "text/event-stream"
PING = format_sse_event(comment="ping")
"""A comment, which readers skip: proxies close connections that are silent."""
_HEADERS = {
    "Cache-Control": "no-cache",
    # Nginx would collect messages instead of passing them on.
    "X-Accel-Buffering": "no",
}


class EventStream(StreamingResponse):
    """A response of messages made by `message`."""

    media_type = MEDIA_TYPE

    def __init__(self, messages: AsyncGenerator[bytes]) -> None:
        super().__init__(messages, headers=_HEADERS)
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the messages until they end or the reader has left."""
        # Closed at once: Python would end the messages of a reader that has left at some
        # later time, and they count as an open stream until then.
        async with contextlib.aclosing(self._messages):
            with contextlib.suppress(ClientDisconnect):
                await super().__call__(scope, receive, send)


def message(data: Any, *, event: str, id: str | None = None) -> bytes:
    """Returns one message; `data` is sent as JSON."""
    # Browsers cannot parse NaN, which losses may be.
    text = to_json(data, inf_nan_mode="null").decode()
    return format_sse_event(data_str=text, event=event, id=id)
