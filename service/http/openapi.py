"""Builds the OpenAPI document of the public API.

Owns: what all operations share: the token, the errors, headers. Must not know: routes.

The framework's document names only the answers that a route returns itself. Errors are
raised elsewhere, so this module adds them to every operation.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.http.auth import OPEN_PATHS
from service.http.errors import MEDIA_TYPE, PROBLEM_TYPES

Json = dict[str, Any]
_GENERIC = re.compile(r"\b([A-Z][A-Za-z]+)_([A-Z][A-Za-z]+)_(?![A-Za-z_])")
METHODS = ("get", "post", "patch", "put", "delete")
INTERNAL_CODES = frozenset({"fenced", "gap", "protocol_unsupported", "job_failed"})
"""Codes that only agents and drivers get, or that only a job's `problem` has."""
_RESPONSES = {
    400: ("BadRequest", "The body is not JSON."),
    401: ("Unauthorized", "No token, or one that is not valid here."),
    403: ("Forbidden", "The token is valid for another part of the service."),
    404: ("NotFound", "What the path names does not exist."),
    405: ("MethodNotAllowed", "The path has other methods."),
    409: ("Conflict", "The job's state does not allow this."),
    413: ("ContentTooLarge", "The body has too many bytes."),
    415: ("UnsupportedMediaType", "The body is sent as something else than JSON."),
    422: ("UnprocessableContent", "A field or parameter is wrong; `errors` names each."),
    429: ("TooManyRequests", "Too many requests of this kind are open."),
    500: ("InternalServerError", "An error of the service, which its log describes."),
    503: ("ServiceUnavailable", "The database or storage does not answer; try again."),
}
"""Status -> name and description of its entry in `components.responses`."""
_HEADERS: dict[str, Json] = {
    "X-Request-ID": {
        "description": "Id of the request: the one that was sent, or a new one. The "
        "service's log names it.",
        "schema": {"type": "string", "examples": ["req-5f0c1d2e3a4b5c6d"]},
    },
    "Retry-After": {
        "description": "Seconds to wait before the next try.",
        "schema": {"type": "integer", "examples": [2]},
    },
    "Allow": {
        "description": "Methods of the path.",
        "schema": {"type": "string", "examples": ["GET, HEAD, OPTIONS"]},
    },
    "WWW-Authenticate": {
        "description": "Scheme of the token.",
        "schema": {"type": "string", "examples": ['Bearer realm="megatron-ray"']},
    },
    "Location": {
        "description": "Path of what was created.",
        "schema": {"type": "string", "examples": ["/v1/jobs/job-4nkjx2s7qzta"]},
    },
    "Idempotent-Replayed": {
        "description": "`true` when this is the stored response to an earlier request with "
        "the same Idempotency-Key.",
        "schema": {"type": "string", "enum": ["true"]},
    },
}
_HEADERS_OF_STATUS = {
    401: ("WWW-Authenticate",),
    405: ("Allow",),
    429: ("Retry-After",),
    503: ("Retry-After",),
}


def build_document(
    app: FastAPI,
    *,
    tags: Mapping[str, str],
    requests: Mapping[str, Any],
    responses: Mapping[str, Any],
    problem: Mapping[str, Any],
    models: Sequence[type[BaseModel]],
) -> Json:
    """Returns the document of an app's public routes.

    `tags` gives each tag its description, `requests` and `responses` give operation ids
    their example bodies; `problem` is the example of an error's body. `models` are those
    that no route names, the body of errors among them.
    """
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=app.description,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        servers=[{"url": "/", "description": "The service that serves this document."}],
        tags=[{"name": name, "description": text} for name, text in tags.items()],
        routes=app.routes,
    )
    components = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    _, schemas = models_json_schema(
        [(model, "serialization") for model in models],
        ref_template="#/components/schemas/{model}",
    )
    components["schemas"] = dict(
        sorted({**schemas["$defs"], **components["schemas"]}.items())
    )
    components["securitySchemes"] = {
        "token": {
            "type": "http",
            "scheme": "bearer",
            "description": "A user's token, sent as `Authorization: Bearer <token>`.",
        }
    }
    components["headers"] = _HEADERS
    components["responses"] = _error_responses(problem)
    for path, method, operation in operations(document):
        is_open = path in OPEN_PATHS
        operation["security"] = [] if is_open else [{"token": []}]
        _add_errors(operation, path, is_open=is_open)
        _add_headers(operation, method)
        _add_examples(operation, requests, responses)
    return _with_plain_names(document)


def _with_plain_names(document: Json) -> Json:
    """Returns a document whose schemas have names that a generated client can use.

    `Page_Event_`, the framework's name for `Page[Event]`, becomes `EventPage`.
    """
    text = _GENERIC.sub(lambda match: f"{match[2]}{match[1]}", json.dumps(document))
    renamed: Json = json.loads(text)
    return renamed


def operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Json]]:
    """Yields path, method and operation of everything that a document describes."""
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                yield path, method, item[method]


def _error_responses(problem: Mapping[str, Any]) -> Json:
    entries: Json = {}
    for status, (name, description) in _RESPONSES.items():
        codes = []
        for code, kind in PROBLEM_TYPES.items():
            if kind.status == status and code not in INTERNAL_CODES:
                codes.append(f"`{code}`: {kind.title}.")
        schema = {"$ref": "#/components/schemas/ProblemDocument"}
        content: Json = {"schema": schema}
        if problem["status"] == status:
            content["example"] = problem
        entries[name] = {
            "description": "\n".join([description, "", *codes]).strip(),
            "headers": _header_references(*_HEADERS_OF_STATUS.get(status, ())),
            "content": {MEDIA_TYPE: content},
        }
    return entries


def _add_errors(operation: Json, path: str, *, is_open: bool) -> None:
    """Names every error that an operation may answer with."""
    # 422: any request may have a query parameter that is not known. 503: the database.
    statuses = {405, 422, 500, 503}
    if not is_open:
        statuses |= {401, 403}
    if "{" in path:
        statuses.add(404)
    if "requestBody" in operation:
        statuses |= {400, 413, 415}
    responses = operation["responses"]
    for status in _RESPONSES:
        # A route may describe one of its own, such as the 503 of /readyz.
        described = responses.get(str(status), {})
        is_replaced = status == 422 or not described.get("content")
        if is_replaced and (status in statuses or described):
            name = _RESPONSES[status][0]
            responses[str(status)] = {"$ref": f"#/components/responses/{name}"}
    operation["responses"] = dict(sorted(responses.items()))


def _add_headers(operation: Json, method: str) -> None:
    takes_key = False
    for parameter in operation.get("parameters", ()):
        takes_key = takes_key or parameter["name"] == "Idempotency-Key"
    for status, response in operation["responses"].items():
        if "$ref" in response:
            continue
        names = []
        if status == "201":
            names.append("Location")
        if takes_key and method == "post":
            names.append("Idempotent-Replayed")
        response["headers"] = _header_references(*names)


def _add_examples(
    operation: Json, requests: Mapping[str, Any], responses: Mapping[str, Any]
) -> None:
    name = operation["operationId"]
    if name in requests:
        for content in operation["requestBody"]["content"].values():
            content["example"] = requests[name]
    for response in operation["responses"].values():
        for content in response.get("content", {}).values():
            # A keyword of OpenAPI 3.2, which the framework adds to streams.
            content.pop("itemSchema", None)
            if name in responses:
                content["example"] = responses[name]


def _header_references(*names: str) -> Json:
    references: Json = {}
    for name in ("X-Request-ID", *names):
        references[name] = {"$ref": f"#/components/headers/{name}"}
    return references
