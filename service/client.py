"""HTTP client of the public API. Owns: requests, retries of what is safe to repeat,
errors as one exception class.

Returns the JSON bodies as they come; what they hold is documented in the service's
OpenAPI. Must not know: torch, ray, terminals.
"""

import contextlib
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

Json = dict[str, Any]

_RETRY_WAITS_S = (0.2, 0.5, 1.0)
_STREAM_READ_TIMEOUT_S = 45.0  # the service sends a comment every 15 s
_STREAM_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_BUSY = (429, 502, 503, 504)


@dataclass(frozen=True)
class FieldProblem:
    """One wrong field of a request."""

    pointer: str
    """JSON pointer of the field."""
    code: str
    detail: str


@dataclass(eq=False)  # not frozen: raising writes the traceback into it
class ServiceError(Exception):
    """The service refused, or could not be reached (`code` is then `unreachable` and
    `status` 0).
    """

    code: str
    """Stable name of what went wrong."""
    detail: str
    status: int = 0
    """HTTP status."""
    errors: tuple[FieldProblem, ...] = ()
    request_id: str | None = None
    problem: Json = field(default_factory=dict)
    """The whole problem+json body."""

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True)
class StreamEvent:
    """One server-sent event; `data` is its parsed JSON."""

    event: str
    id: str | None
    data: Any


class Client:
    """One service, one token.

    Safe requests are repeated for a moment when the service is away or busy.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.url = url.rstrip("/")
        # The system's proxies are for the world outside, and the service is usually on
        # this machine.
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=timeout_s,
            transport=transport,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives connections back."""
        self._http.close()

    # ---- jobs

    def submit(self, spec: Mapping[str, Any], idempotency_key: str | None = None) -> Json:
        """Creates a job.

        Repeating it with the same key and spec gives the same job, so a lost answer
        costs nothing.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._object("POST", "/v1/jobs", json=spec, headers=headers, repeat=True)

    def plan(self, spec: Mapping[str, Any], *, hardware: str | None = None) -> Json:
        """How a job would run: resolved spec, rank map, memory, communication, time;
        nothing is started. `hardware`: a device's name.
        """
        return self._planned("/v1/plans", spec, hardware=hardware)

    def suggest(
        self,
        spec: Mapping[str, Any],
        *,
        hardware: str | None = None,
        ranks: int | None = None,
    ) -> Json:
        """The quickest layouts of a job that fit."""
        return self._planned("/v1/plans/suggest", spec, hardware=hardware, ranks=ranks)

    def _planned(self, path: str, spec: Mapping[str, Any], **params: Any) -> Json:
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        return self._object(
            "POST",
            path,
            params=_given(**params),
            json=dict(spec),
            headers=headers,
            repeat=True,
        )

    def jobs(
        self,
        *,
        limit: int | None = None,
        after: str | None = None,
        status: str | None = None,
    ) -> Json:
        """One page of jobs, newest first; `after` takes the last id of the page before."""
        return self._object(
            "GET", "/v1/jobs", params=_given(limit=limit, after=after, status=status)
        )

    def show(self, job_id: str) -> Json:
        """One job."""
        return self._object("GET", f"/v1/jobs/{job_id}")

    def cancel(self, job_id: str) -> Json:
        """Asks a job to end; the job as it is now. Cancelling again is harmless."""
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        return self._object(
            "POST", f"/v1/jobs/{job_id}/cancel", headers=headers, repeat=True
        )

    def events(
        self,
        job_id: str,
        *,
        limit: int | None = None,
        after: str | None = None,
        types: str | None = None,
        levels: str | None = None,
        newest_first: bool = False,
    ) -> Json:
        """One page of a job's history, oldest first unless told otherwise; `types` and
        `levels` are comma-separated lists.
        """
        params = _given(
            limit=limit,
            after=after,
            type=types,
            level=levels,
            order="desc" if newest_first else None,
        )
        return self._object("GET", f"/v1/jobs/{job_id}/events", params=params)

    def attempts(self, job_id: str) -> Json:
        """Every attempt of a job, oldest first."""
        return self._object("GET", f"/v1/jobs/{job_id}/attempts")

    def metrics(
        self,
        job_id: str,
        *,
        keys: str | None = None,
        from_step: int | None = None,
        max_points: int | None = None,
        attempt: int | None = None,
    ) -> Json:
        """Rows of {step, attempt, <keys>}, thinned out to `max_points`; `keys` is a
        comma-separated list.
        """
        params = _given(
            keys=keys, from_step=from_step, max_points=max_points, attempt=attempt
        )
        return self._object("GET", f"/v1/jobs/{job_id}/metrics", params=params)

    def logs(
        self,
        job_id: str,
        *,
        rank: int = 0,
        attempt: int | None = None,
        offset: int | None = None,
        limit: int | None = None,
    ) -> Json:
        """A piece of one rank's log: {data, next_offset}."""
        params = _given(rank=rank, attempt=attempt, offset=offset, limit=limit)
        return self._object("GET", f"/v1/jobs/{job_id}/logs", params=params)

    def ranks(self, job_id: str) -> Json:
        """Which rank runs where."""
        return self._object("GET", f"/v1/jobs/{job_id}/ranks")

    def checkpoints(self, job_id: str) -> Json:
        """Committed checkpoints, newest last."""
        return self._object("GET", f"/v1/jobs/{job_id}/checkpoints")

    def cluster(self) -> Json:
        """Clusters, their nodes and agents."""
        return self._object("GET", "/v1/cluster")

    def ready(self) -> tuple[bool, Json]:
        """Whether service, agents and Ray are all there, and what the service says;
        (False, {}) when it does not answer.
        """
        try:
            response = self._http.get("/readyz", timeout=5.0)
        except httpx.HTTPError:
            return False, {}
        body = _body(response)
        return response.status_code == 200 and body.get("status") == "ok", body

    # ---- streams

    def stream(
        self,
        job_id: str,
        *,
        last_event_id: str | None = None,
        give_up_after_s: float = 120.0,
    ) -> Iterator[StreamEvent]:
        """Events of a job until `end`, over as many connections as it takes: each goes
        on after the last event id seen.

        Raises ServiceError when the service refuses, or has been away for
        `give_up_after_s`.
        """
        seen = last_event_id
        failures = 0
        away_since = time.monotonic()
        while True:
            try:
                with self._open_stream(f"/v1/jobs/{job_id}/stream", seen) as lines:
                    # it answers: what breaks from here on is the connection, and is
                    # soon made again
                    failures = 0
                    for event in parse_stream(lines):
                        seen = event.id or seen
                        away_since = time.monotonic()
                        yield event
                        if event.event == "end":
                            return
            except httpx.HTTPError as error:
                if time.monotonic() - away_since > give_up_after_s:
                    raise _unreachable(self.url, error) from error
            except ServiceError as error:
                if (
                    error.status not in _BUSY
                    or time.monotonic() - away_since > give_up_after_s
                ):
                    raise
            time.sleep(_STREAM_BACKOFF_S[min(failures, len(_STREAM_BACKOFF_S) - 1)])
            failures += 1

    @contextlib.contextmanager
    def _open_stream(self, path: str, last_event_id: str | None) -> Iterator[Iterator[str]]:
        """The lines of one connection."""
        headers = {"Accept": "text/event-stream"} | (
            {"Last-Event-ID": last_event_id} if last_event_id else {}
        )
        timeout = httpx.Timeout(10.0, read=_STREAM_READ_TIMEOUT_S)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if response.status_code != 200:
                response.read()
                raise _refusal(response)
            yield _lines(response.iter_bytes())

    # ---- one request

    def _object(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        repeat: bool = False,
    ) -> Json:
        response = self._send(
            self._http.build_request(
                method, path, params=params, json=json, headers=headers
            ),
            repeat or method == "GET",
        )
        if response.status_code >= 400:
            raise _refusal(response)
        body = _body(response)
        if not body:
            raise ServiceError(
                "bad_answer",
                f"{self.url}{path} did not answer with a JSON object; is that a "
                "megatron-ray service?",
            )
        return body

    def _send(self, request: httpx.Request, repeat: bool) -> httpx.Response:
        for wait_s in (*_RETRY_WAITS_S, None):
            try:
                response = self._http.send(request)
            except httpx.HTTPError as error:
                if wait_s is None or not repeat:
                    raise _unreachable(self.url, error) from error
            else:
                if wait_s is None or not repeat or response.status_code not in _BUSY:
                    return response
            time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")


def parse_stream(lines: Iterator[str]) -> Iterator[StreamEvent]:
    """Server-sent events out of lines (WHATWG HTML, section 9.2): comments are skipped,
    an unfinished event is dropped.
    """
    name = "message"
    identity = None
    data = list[str]()
    for line in lines:
        if line == "":
            if data:
                yield StreamEvent(name, identity, json.loads("\n".join(data)))
            name = "message"
            data = []
            continue
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if key == "data":
            data.append(value)
        elif key == "event":
            name = value
        elif key == "id":
            identity = value


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Whole lines, ended by a line feed: JSON may hold others of the characters that
    `str.splitlines` takes for ends.
    """
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.removesuffix(b"\r").decode() for line in whole)


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def _body(response: httpx.Response) -> Json:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _refusal(response: httpx.Response) -> ServiceError:
    body = _body(response)
    errors = tuple(
        FieldProblem(
            str(error.get("pointer", "")),
            str(error.get("code", "")),
            str(error.get("detail", "")),
        )
        for error in body.get("errors") or ()
    )
    detail = (
        body.get("detail")
        or body.get("title")
        or f"{response.request.method} {response.request.url} answered {response.status_code}"
    )
    return ServiceError(
        code=str(body.get("code") or f"http_{response.status_code}"),
        detail=str(detail),
        status=response.status_code,
        errors=errors,
        request_id=body.get("request_id"),
        problem=body,
    )


def _unreachable(url: str, error: Exception) -> ServiceError:
    return ServiceError(
        "unreachable", f"no service answers at {url} ({type(error).__name__}: {error})"
    )
