"""What HTTP clients expect of any service: HEAD, OPTIONS, Allow, types of bodies; and no
parameter that is accepted and ignored.
"""

import json
import time
from typing import Any

import pytest


def problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body: dict[str, Any] = response.json()
    return body


def test_head_is_get_without_the_body(service: Any) -> None:
    job_id = service.submit()["id"]
    paths = ("/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/jobs", "/v1/cluster")
    for path in (*paths, f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events"):
        got = service.user.get(path)
        head = service.user.head(path)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
        assert head.headers["x-request-id"]
    assert service.user.head("/v1/jobs/none").status_code == 404
    assert service.client(None).head("/v1/jobs").status_code == 401
    # A stream has no end of its own: its headers come, and it ends with them.
    head = service.user.head(f"/v1/jobs/{job_id}/stream")
    assert head.headers["content-type"].startswith("text/event-stream")
    telemetry = service.app.state.context.telemetry
    deadline = time.monotonic() + 10
    while telemetry.open_streams and time.monotonic() < deadline:
        time.sleep(0.01)
    assert telemetry.open_streams == 0


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/jobs", "GET, HEAD, OPTIONS, POST"),
        ("/v1/jobs/job-x", "DELETE, GET, HEAD, OPTIONS"),
        ("/v1/jobs/job-x/cancel", "OPTIONS, POST"),
        ("/v1/jobs:cancel", "OPTIONS, POST"),
        ("/healthz", "GET, HEAD, OPTIONS"),
    ],
)
def test_allow_names_every_method_of_a_path(service: Any, path: str, methods: str) -> None:
    options = service.user.options(path)
    assert (options.status_code, options.headers["Allow"]) == (204, methods)
    refused = service.user.put(path)
    assert problem(refused, 405)["code"] == "method_not_allowed"
    assert refused.headers["Allow"] == methods
    assert refused.json()["detail"].endswith(f"it supports {methods}")


def test_unknown_routes_have_no_methods(service: Any) -> None:
    assert service.user.options("/v1/nothing").status_code == 404
    detail = problem(service.user.get("/v1/jobs/"), 404)["detail"]
    assert "leave out the slash at the end" in detail


@pytest.mark.parametrize(
    ("headers", "detail"),
    [
        (
            {"Content-Type": "application/x-www-form-urlencoded"},
            "x-www-form-urlencoded'; send",
        ),
        ({"Content-Type": "text/plain; charset=utf-8"}, "'text/plain'; send JSON"),
        ({}, "''; send JSON with the header Content-Type: application/json"),
        (
            {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            "Content-Encoding 'gzip' is not supported",
        ),
    ],
)
def test_bodies_that_are_no_json_are_refused_by_their_type(
    service: Any, headers: dict[str, str], detail: str
) -> None:
    for path in ("/v1/jobs", "/v1/plans", "/v1/jobs:cancel"):
        body = problem(service.user.post(path, content=b"a=b", headers=headers), 415)
        assert body["code"] == "unsupported_media_type"
        assert detail in body["detail"]


def test_any_json_type_and_an_empty_body_are_read(service: Any, spec: Any) -> None:
    for kind in ("application/json; charset=utf-8", "application/vnd.spec+json"):
        response = service.user.post(
            "/v1/jobs", content=json.dumps(spec), headers={"Content-Type": kind}
        )
        assert response.status_code == 201, response.text
    job_id = response.json()["id"]
    assert service.user.post(f"/v1/jobs/{job_id}/cancel").status_code == 202
    assert "is empty" in problem(service.user.post("/v1/jobs"), 422)["detail"]


@pytest.mark.parametrize(
    ("path", "pointer", "detail"),
    [
        ("/v1/jobs?statsu=running", "statsu", "did you mean 'status'?"),
        ("/v1/jobs?metadata=team", "metadata", "send metadata[<label>]=<value>"),
        ("/v1/jobs?metadata[team=a", "metadata[team", "unknown query parameter"),
        ("/v1/jobs?limit=1&limit=2", "limit", "limit was sent 2 times; send it once"),
        ("/v1/jobs/x/ranks?rank=1", "rank", "known here: attempt"),
        ("/v1/cluster?name=x", "name", "none is known here"),
        ("/healthz?verbose", "verbose", "none is known here"),
        ("/v1/jobs?status=", "status", "got ''"),
        ("/v1/jobs/x/events?level=nonsense", "level", "must be 'info', 'warn' or 'error'"),
        (
            "/v1/jobs/x/events?type=job.fialed",
            "type",
            "such as 'job.failed', got 'job.fialed'",
        ),
    ],
)
def test_parameters_are_never_ignored(
    service: Any, path: str, pointer: str, detail: str
) -> None:
    error = problem(service.user.get(path), 422)["errors"][0]
    assert error["pointer"] == f"/query/{pointer}"
    assert detail in error["detail"]


def test_numbers_of_a_query_are_written_as_in_a_spec(service: Any) -> None:
    assert service.user.get("/v1/jobs?limit=1e1").status_code == 200
    assert service.user.get("/v1/jobs?limit=0x10").status_code == 200
    for path, detail in [
        ("/v1/jobs?limit=1e3", "limit must be at most 100, got 1000"),
        ("/v1/jobs?limit=10%25", "limit must be a whole number, got '10%'; write it as"),
        (
            "/v1/jobs/x/logs?offset=" + "9" * 5000,
            "offset must be a whole number with fewer",
        ),
    ]:
        assert detail in problem(service.user.get(path), 422)["detail"]


def test_attempts_that_do_not_exist_are_not_found_anywhere(service: Any) -> None:
    job_id, _ = service.running_job()
    for part in ("metrics", "ranks", "logs"):
        response = service.user.get(f"/v1/jobs/{job_id}/{part}?attempt=3")
        body = problem(response, 404)
        assert body["errors"][0]["pointer"] == "/query/attempt"
        assert "no attempt 3; the job has 1 attempt" in body["detail"]


@pytest.mark.parametrize(
    ("stream_id", "reason"),
    [
        ("12", "is no id of a message"),
        ("job-other.1.0", "belongs to job-other"),
        ("{id}.9999.0", "is ahead of the job"),
        ("{id}.1.9999", "is ahead of the job"),
    ],
)
def test_a_stream_starts_only_after_a_message_of_its_own(
    service: Any, stream_id: str, reason: str
) -> None:
    job_id = service.submit()["id"]
    sent = stream_id.replace("{id}", job_id)
    path = f"/v1/jobs/{job_id}/stream"
    by_header = service.user.get(path, headers={"Last-Event-ID": sent})
    assert reason in problem(by_header, 422)["detail"]
    by_query = service.user.get(path, params={"after": sent})
    assert problem(by_query, 422)["errors"][0]["pointer"] == "/query/after"
    ahead = service.user.get(f"/v1/jobs/{job_id}/events?after=99")
    assert "is no event of" in problem(ahead, 422)["detail"]


def test_other_schemes_are_refused_by_name_and_never_repeat_a_token(service: Any) -> None:
    nobody = service.client(None)
    basic = nobody.get("/v1/jobs", headers={"Authorization": "Basic dTp1"})
    assert "Basic is not supported" in problem(basic, 401)["detail"]
    bare = nobody.get("/v1/jobs", headers={"Authorization": "u" * 43})
    assert "u" * 10 not in problem(bare, 401)["detail"]


def test_a_key_whose_job_was_deleted_creates_nothing(service: Any, spec: Any) -> None:
    headers = {"Idempotency-Key": "mine"}
    job_id = service.submit(spec, **headers)["id"]
    service.user.post(f"/v1/jobs/{job_id}/cancel")
    assert service.user.delete(f"/v1/jobs/{job_id}").status_code == 204
    body = problem(service.user.post("/v1/jobs", json=spec, headers=headers), 409)
    assert body["code"] == "job_deleted"
    assert job_id in body["detail"]


def test_a_job_that_is_being_cancelled_is_not_told_to_be_cancelled(service: Any) -> None:
    job_id, _ = service.running_job()
    service.user.post(f"/v1/jobs/{job_id}/cancel")
    body = problem(service.user.delete(f"/v1/jobs/{job_id}"), 409)
    assert body["detail"] == "the job is being cancelled; wait until it has ended"


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b'{"name": "\xff"}', "the body is not UTF-8 at byte 10; send JSON in UTF-8"),
        (b"[" * 10_000, "nested too deeply"),
    ],
)
def test_bodies_that_cannot_be_read_are_refused_with_the_cause(
    service: Any, content: bytes, detail: str
) -> None:
    headers = {"Content-Type": "application/json"}
    response = service.user.post("/v1/jobs", content=content, headers=headers)
    assert detail in problem(response, 400)["detail"]
