"""Every answer that is not a success.

Owns: problem kinds and their RFC 9457 form. Must not know: routes, jobs.

A detail says what is wrong and what to do about it; what went wrong inside is logged
under the request's id and never shown.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from megatron_ray.config.problem import Problem
from service.jobs.spec_problems import from_pydantic

MEDIA_TYPE = "application/problem+json"
logger = logging.getLogger("service")

KINDS: dict[str, tuple[int, str]] = {
    "json_invalid": (400, "The body is not valid JSON"),
    "bad_request": (400, "The request cannot be understood"),
    "unauthenticated": (401, "A valid token is needed"),
    "forbidden": (403, "This token may not do that"),
    "not_found": (404, "There is no such thing"),
    "method_not_allowed": (405, "This address does not know this method"),
    "job_active": (409, "The job is still active"),
    "job_ended": (409, "The job is over"),
    "job_failed": (500, "The job failed"),
    "fenced": (409, "A newer driver has taken over"),
    "gap": (409, "Records are missing"),
    "protocol_unsupported": (409, "The message's protocol is not spoken here"),
    "body_too_large": (413, "The body is too large"),
    "spec_invalid": (422, "The job spec cannot be run as it is"),
    "request_invalid": (422, "The request has wrong values"),
    "idempotency_key_reused": (422, "The Idempotency-Key belongs to another request"),
    "too_many_streams": (429, "Too many open streams"),
    "internal": (500, "Something went wrong inside the service"),
    "unavailable": (503, "The database does not answer"),
}
"""Stable code -> (HTTP status, title)."""


class ProblemError(HTTPException):
    """Ends a request with a problem document.

    An HTTPException, so that FastAPI lets it through wherever it is raised, while it
    reads the body too.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        errors: Iterable[Problem] = (),
        headers: Mapping[str, str] | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(KINDS[code][0], detail, dict(headers or {}))
        self.code = code
        self.errors = tuple(errors)
        self.extra = extra


def spec_invalid(problems: Iterable[Problem]) -> ProblemError:
    """All that is wrong with a spec, in one answer."""
    found = tuple(problems)
    first = f"{found[0].pointer or 'the spec'}: {found[0].detail}"
    return ProblemError(
        "spec_invalid",
        first if len(found) == 1 else f"{first} (and {len(found) - 1} more)",
        errors=found,
    )


def document(
    code: str, detail: str, errors: Iterable[Problem] = (), **extra: Any
) -> dict[str, Any]:
    """The JSON of a problem, without what belongs to one request."""
    status, title = KINDS[code]
    entries = [
        {"pointer": item.pointer, "code": item.code, "detail": item.detail}
        for item in errors
    ]
    return {
        "type": f"urn:megatron-ray:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "errors": entries,
        **extra,
    }


def respond(error: ProblemError, path: str, request_id: str) -> Response:
    """The answer to one request."""
    body = {
        **document(error.code, str(error.detail), error.errors, **error.extra),
        "instance": path,
        "request_id": request_id,
    }
    return JSONResponse(
        body, status_code=error.status_code, headers=error.headers, media_type=MEDIA_TYPE
    )


def install(app: FastAPI) -> None:
    """Makes every error of the app a problem document."""
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(OperationalError, _on_database)
    app.add_exception_handler(Exception, _on_anything)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ProblemError):
        return _respond(request, error)
    path = request.url.path
    method = request.method
    known = {
        404: ("not_found", f"nothing is at {path}; /openapi.json lists every address"),
        405: (
            "method_not_allowed",
            f"{path} does not know {method}; /openapi.json lists what it knows",
        ),
    }
    code, detail = known.get(
        error.status_code,
        ("bad_request", f"{error.detail}; /openapi.json describes what is expected"),
    )
    return _respond(request, ProblemError(code, detail, headers=error.headers))


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    details = error.errors()
    if details[0]["type"] == "json_invalid":
        where = (
            f"{details[0].get('ctx', {}).get('error', 'cannot be parsed')} at character "
            f"{details[0]['loc'][-1]}"
        )
        text = (
            f"the body is not valid JSON: {where}; send one JSON object with Content-Type: "
            "application/json"
        )
        problem = Problem("", "json_invalid", text)
        return _respond(
            request, ProblemError("json_invalid", problem.detail, errors=[problem])
        )
    in_body = [item for item in details if item["loc"][:1] == ("body",)]
    if in_body:
        if getattr(request.scope.get("route"), "path", "").endswith(
            ("/jobs", "/plans")
        ):  # their body is a job spec
            return _respond(
                request, spec_invalid(from_pydantic(in_body, error.body, skip=1))
            )
        found = from_pydantic(in_body, error.body, skip=1, model=None)
        return _respond(
            request,
            ProblemError(
                "request_invalid",
                "; ".join(f"{item.pointer}: {item.detail}" for item in found),
                errors=found,
            ),
        )
    found = [
        Problem(
            "/" + "/".join(map(str, item["loc"])),
            item["type"],
            f"{item['loc'][-1]}: {item['msg']}",
        )
        for item in details
    ]
    return _respond(
        request,
        ProblemError(
            "request_invalid", "; ".join(item.detail for item in found), errors=found
        ),
    )


async def _on_database(request: Request, error: Exception) -> Response:
    logger.error(
        "request %s: the database does not answer", _request_id(request), exc_info=error
    )
    return _respond(
        request,
        ProblemError(
            "unavailable",
            "the database does not answer; try again",
            headers={"Retry-After": "2"},
        ),
    )


async def _on_anything(request: Request, error: Exception) -> Response:
    request_id = _request_id(request)
    logger.error("request %s failed", request_id, exc_info=error)
    text = (
        "this is a fault of the service, not of the request; its log has the cause under "
        f"{request_id}"
    )
    response = _respond(request, ProblemError("internal", text))
    response.headers["X-Request-ID"] = (
        request_id  # this handler runs outside the layer that adds it
    )
    return response


def _respond(request: Request, error: ProblemError) -> Response:
    return respond(error, request.url.path, _request_id(request))


def _request_id(request: Request) -> str:
    return str(getattr(request.state, "request_id", "unknown"))
