"""Answers every error with a problem document (RFC 9457).

Owns: status and title of each error code, and the form of the document. Must not know:
routes, jobs.

A detail contains the error and the remedy; internal errors are logged with the
request's id and never shown.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from megatron_ray.config.errors.messages import refusal
from megatron_ray.config.errors.spec_problems import pointer_to, problems_from_pydantic
from megatron_ray.config.problem import Problem
from service.exceptions import (
    MAX_ERRORS,
    RequestInvalidError,
    ServiceProblemError,
    SpecInvalidError,
)
from service.http.methods import allowed_methods
from workers.protocol.job import JobSpec

MEDIA_TYPE = "application/problem+json"
_SPEC_ROUTES = ("/jobs", "/plans", "/plans/suggest")
"""Ends of the routes whose body is a job spec."""
logger = logging.getLogger("service")


class ProblemType(NamedTuple):
    """HTTP status and title of one error code."""

    status: int
    title: str


PROBLEM_TYPES = {
    "json_invalid": ProblemType(400, "The body is not valid JSON"),
    "bad_request": ProblemType(400, "Bad request"),
    "unauthenticated": ProblemType(401, "A valid token is required"),
    "forbidden": ProblemType(403, "The token does not allow this"),
    "not_found": ProblemType(404, "Not found"),
    "method_not_allowed": ProblemType(405, "Method not allowed"),
    "job_active": ProblemType(409, "The job has not ended"),
    "job_ended": ProblemType(409, "The job has ended"),
    "job_not_running": ProblemType(409, "The job is not running"),
    "no_room": ProblemType(409, "The cluster has no room"),
    "profile_running": ProblemType(409, "Another profile is not written yet"),
    "job_deleted": ProblemType(409, "The job was deleted"),
    "job_failed": ProblemType(500, "The job failed"),
    "fenced": ProblemType(409, "A newer driver has taken over"),
    "gap": ProblemType(409, "Records are missing"),
    "protocol_unsupported": ProblemType(409, "Unsupported protocol version"),
    "body_too_large": ProblemType(413, "The body is too large"),
    "unsupported_media_type": ProblemType(415, "The body is not JSON"),
    "spec_invalid": ProblemType(422, "The job spec cannot run"),
    "request_invalid": ProblemType(422, "The request has invalid values"),
    "idempotency_key_reused": ProblemType(422, "The Idempotency-Key was used before"),
    "too_many_streams": ProblemType(429, "Too many open streams"),
    "internal": ProblemType(500, "Internal error of the service"),
    "unavailable": ProblemType(503, "The database or storage does not answer"),
}
"""Stable error code -> status and title."""


class ProblemError(HTTPException):
    """Ends a request with a problem that only exists in HTTP, such as a wrong token.

    An HTTPException, because FastAPI turns any other exception that is raised while it
    reads a body into a bare 400.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        errors: Iterable[Problem] = (),
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(PROBLEM_TYPES[code].status, detail, dict(headers or {}))
        self.code = code
        self.errors = tuple(errors)


def problem_document(
    code: str, detail: str, errors: Iterable[Mapping[str, Any]] = (), **extra: Any
) -> dict[str, Any]:
    """Returns the JSON of a problem, without the members that belong to one request."""
    kind = PROBLEM_TYPES[code]
    return {
        "type": f"urn:megatron-ray:problem:{code}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "code": code,
        "errors": list(errors),
        **extra,
    }


def respond(
    error: ProblemError | ServiceProblemError, path: str, request_id: str
) -> Response:
    """Returns the response to one request that failed."""
    headers: Mapping[str, str] | None = None
    extra: dict[str, Any] = {}
    if isinstance(error, ProblemError):
        headers = error.headers
    else:
        extra = error.extra
        if error.retry_after_s is not None:
            headers = {"Retry-After": str(error.retry_after_s)}
    # `instance` and `request_id` belong to this response, not to the kind of problem.
    entries = [asdict(problem) for problem in error.errors]
    document = problem_document(error.code, error.detail, entries, **extra)
    body = {**document, "instance": path, "request_id": request_id}
    return JSONResponse(
        body, status_code=document["status"], headers=headers, media_type=MEDIA_TYPE
    )


def install(app: FastAPI) -> None:
    """Makes the app answer every error with a problem document."""
    # Starlette picks the handler of the most specific class of an error.
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ServiceProblemError, _on_service_problem)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(OperationalError, _on_database)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_anything)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ProblemError):
        return _respond(request, error)
    # Errors of the framework have a status but little detail.
    path = request.url.path
    # Routing errors are unknown paths and methods; all others are about bodies.
    if error.status_code == 404:
        code = "not_found"
        detail = f"no route {path}; routes are listed in /openapi.json"
        if path.endswith("/") and path != "/":
            detail += "; leave out the slash at the end"
    elif error.status_code == 405:
        return _on_other_method(request)
    else:
        code = "bad_request"
        detail = _unreadable_body(error)
    return _respond(request, ProblemError(code, detail, headers=error.headers))


def _on_other_method(request: Request) -> Response:
    """Answers OPTIONS, and refuses every other method that a path does not know."""
    methods = allowed_methods(request)
    # The router's own header names the methods of one of several routes only.
    headers = {"Allow": ", ".join(methods)}
    if request.method == "OPTIONS":
        return Response(status_code=204, headers=headers)
    detail = f"{request.url.path} does not support {request.method}; it supports "
    detail += ", ".join(methods)
    return _respond(request, ProblemError("method_not_allowed", detail, headers=headers))


def _unreadable_body(error: HTTPException) -> str:
    """Returns why a body could not be read, which the framework gives as the cause only."""
    cause = error.__cause__
    if isinstance(cause, UnicodeDecodeError):
        return f"the body is not UTF-8 at byte {cause.start}; send JSON in UTF-8"
    if isinstance(cause, RecursionError):
        return "the body is nested too deeply; no field needs more than a few levels"
    if isinstance(cause, ValueError):
        # Python reads no such numbers, because the cost would be the square of the digits.
        return "the body has a whole number of thousands of digits; no field takes one"
    return f"{error.detail}; see /openapi.json for what is expected"


async def _on_service_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceProblemError)
    return _respond(request, error)


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    details = error.errors()
    # For a body that is not JSON, FastAPI reports this single error.
    if details[0]["type"] == "json_invalid":
        detail = _json_detail(details[0])
        problem = Problem("", "json_invalid", detail)
        return _respond(request, ProblemError("json_invalid", detail, [problem]))
    in_body = [item for item in details if item["loc"][:1] == ("body",)]
    if not in_body:
        return _respond(request, _invalid_parameters(details))
    route_path = str(getattr(request.scope.get("route"), "path", ""))
    return _respond(request, invalid_body(route_path, in_body, error.body))


def invalid_body(
    route_path: str, details: Sequence[Mapping[str, Any]], body: Any
) -> ServiceProblemError:
    """Returns the error for a body of a route; `details` are those of the framework."""
    # Thousands of wrong fields are counted, not described.
    described = details[:MAX_ERRORS]
    num_more = len(details) - len(described)
    # `skip`: each location starts with "body".
    if route_path.endswith(_SPEC_ROUTES):
        problems = problems_from_pydantic(
            described, body, skip=1, model=JobSpec, expected="a job spec"
        )
        return SpecInvalidError(problems, num_more)
    problems = problems_from_pydantic(described, body, skip=1)
    return RequestInvalidError.of_problems(problems)


def _json_detail(item: Mapping[str, Any]) -> str:
    reason = item.get("ctx", {}).get("error", "cannot be parsed")
    return (
        f"the body is not valid JSON: {reason} at character {item['loc'][-1]}; send one "
        "JSON object with Content-Type: application/json"
    )


def _invalid_parameters(details: Sequence[Mapping[str, Any]]) -> RequestInvalidError:
    """Returns the error for wrong path, query or header parameters."""
    problems = []
    sentences = []
    for item in details:
        # After the kind of parameter comes its name, and in lists the index of a value.
        name = item["loc"][1]
        sentence = f"{name} is required; add it"
        if item["type"] != "missing":
            sentence = f"{name} {refusal(item, item.get('input'))}"
        sentences.append(sentence)
        problems.append(Problem(pointer_to(item["loc"][:2]), item["type"], sentence))
    return RequestInvalidError("; ".join(sentences), problems)


async def _on_database(request: Request, error: Exception) -> Response:
    request_id = _request_id(request)
    logger.error("request %s: the database does not answer", request_id, exc_info=error)
    detail = "the database does not answer; try again"
    return _respond(
        request, ProblemError("unavailable", detail, headers={"Retry-After": "2"})
    )


async def _on_disconnect(request: Request, error: Exception) -> Response:
    # Not an error of the service, and the client does not read the response any more.
    return _respond(request, ProblemError("bad_request", "the body ended too early"))


async def _on_anything(request: Request, error: Exception) -> Response:
    request_id = _request_id(request)
    logger.error("request %s failed", request_id, exc_info=error)
    detail = (
        "this is an error of the service, not of the request; its log has the cause under "
        f"{request_id}"
    )
    response = _respond(request, ProblemError("internal", detail))
    # This handler runs outside the middleware that adds the header to all others.
    response.headers["X-Request-ID"] = request_id
    return response


def _respond(request: Request, error: ProblemError | ServiceProblemError) -> Response:
    return respond(error, request.url.path, _request_id(request))


def _request_id(request: Request) -> str:
    return str(getattr(request.state, "request_id", "unknown"))
