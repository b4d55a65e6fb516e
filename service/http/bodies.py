"""Bounds the cost of a request's body, before a route's own code runs.

Owns: how many values a body may have, how deeply it may be nested, and validation in a
thread. Must not know: routes, jobs.

The framework validates on the event loop, where one hostile body would stop everybody
else; what arrives there has been validated here and is small.
"""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from anyio.to_thread import run_sync
from fastapi import Request, Response
from fastapi.routing import APIRoute

from megatron_ray.config.parsing.json_values import UnusableJSONError, read_json
from megatron_ray.config.problem import Problem
from service.http.dependencies import context_of
from service.http.errors import ProblemError, invalid_body

MAX_VALUES = 16_384
"""Values of a body; a spec with the most sources has half as many."""
MAX_MEMBERS = 1024
"""Members of one object or list."""
MAX_DEPTH = 32
"""Objects and lists inside each other; a spec has six."""
_REMEDY = "see /openapi.json for what is expected"


class BoundedBodyRoute(APIRoute):
    """A route that validates its body in a thread before the framework does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns the handler of a request; called by the framework."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_bounded(request: Request) -> Response:
            # Kept by the request, so that the framework reads it again for nothing.
            body = await request.body()
            check = partial(self._check, body)
            await run_sync(check, limiter=context_of(request).validation)
            return await handle(request)

        return handle_bounded

    def _check(self, body: bytes) -> None:
        """Raises ProblemError or ServiceProblemError for a body that must not go on."""
        # Counted before parsing, which may not be interrupted.
        num_values = body.count(b",") + body.count(b"[") + body.count(b"{")
        if num_values > MAX_VALUES:
            raise _refusal(f"the body has more than {MAX_VALUES:,} values")
        try:
            value = read_json(body)
        except UnusableJSONError as error:
            problem = Problem(error.pointer, "bad_json", str(error))
            raise ProblemError("bad_request", str(error), [problem]) from error
        # The framework answers for what is missing or no JSON.
        except (ValueError, RecursionError):
            return
        _check_shape(value)
        assert self.body_field is not None
        _, errors = self.body_field.validate(value, {}, loc=("body",))
        if errors:
            raise invalid_body(self.path, errors, value)


def _check_shape(body: Any) -> None:
    level = [body]
    for _ in range(MAX_DEPTH):
        below = []
        for value in level:
            if isinstance(value, dict):
                value = list(value.values())
            if not isinstance(value, list):
                continue
            if len(value) > MAX_MEMBERS:
                raise _refusal(
                    f"an object or list of the body has {len(value):,} members, and at most "
                    f"{MAX_MEMBERS:,} are allowed"
                )
            below += value
        if not below:
            return
        level = below
    raise _refusal(f"the body is nested more than {MAX_DEPTH} levels deep")


def _refusal(reason: str) -> ProblemError:
    return ProblemError("bad_request", f"{reason}; {_REMEDY}")
