"""Calls the service's public API over HTTP.

Owns: requests, retries of what is safe to repeat, errors as one exception class. Must not
know: torch, Ray, terminals.

Methods return JSON bodies as the service sends them; /openapi.json describes them.
"""

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from megatron_ray.config.problem import Problem
from megatron_ray.exceptions import redacted
from service.event_stream import StreamEvent, lines_of, parse_stream

Json = dict[str, Any]

# A restart of the service takes about a second.
_RETRY_WAITS_S = (0.2, 0.5, 1.0)
_STREAM_READ_TIMEOUT_S = 45.0  # the service sends a comment every 15 s
_STREAM_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# Answers that another try may not get: too many streams, a database or proxy in trouble.
_BUSY = (429, 502, 503, 504)


@dataclass(eq=False)  # not frozen: raising writes the traceback into it
class ServiceError(Exception):
    """The service refused a request, or could not be reached.

    When it could not be reached, `code` is `unreachable` and `status` 0.
    """

    code: str
    """Stable name of the error."""
    detail: str
    status: int = 0
    """HTTP status."""
    errors: tuple[Problem, ...] = ()
    """Wrong fields of the request."""
    request_id: str | None = None
    problem: Json = field(default_factory=dict)
    """The whole problem+json body."""

    def __str__(self) -> str:
        return self.detail


class Client:
    """A client of one service, with one token.

    Requests that are safe to repeat are repeated for some seconds while the service is
    down or busy.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self.url = url.rstrip("/")
        # trust_env: the environment's proxies are for the internet, and the service is
        # usually on this machine.
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=timeout_s,
            transport=transport,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections."""
        self._http.close()

    # ---- jobs

    def submit(self, spec: Mapping[str, Any], idempotency_key: str | None = None) -> Json:
        """Creates a job and returns it.

        Repeating it with the same key and spec returns the same job, so a lost response
        costs nothing.
        """
        return self._post("/v1/jobs", spec, key=idempotency_key)

    def plan(
        self,
        spec: Mapping[str, Any],
        *,
        hardware: str | None = None,
        ranks: int | None = None,
    ) -> Json:
        """Returns how a job would run: resolved spec, ranks, memory, communication, time.

        Nothing is started. `hardware` is the name of a device.
        """
        return self._plan("/v1/plans", spec, hardware=hardware, ranks=ranks)

    def suggest(
        self,
        spec: Mapping[str, Any],
        *,
        hardware: str | None = None,
        ranks: int | None = None,
    ) -> Json:
        """Returns the fastest layouts of a job that fit."""
        return self._plan("/v1/plans/suggest", spec, hardware=hardware, ranks=ranks)

    def _plan(self, path: str, spec: Mapping[str, Any], **params: Any) -> Json:
        return self._post(path, dict(spec), params=_without_none(**params))

    def jobs(
        self,
        *,
        limit: int | None = None,
        after: str | None = None,
        status: str | None = None,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Json:
        """Returns one page of jobs, newest first.

        `after` is the last id of the previous page; `status` is a comma-separated list; in
        `name` a `*` stands for any characters; the labels of `metadata` must all match.
        """
        params = _without_none(limit=limit, after=after, status=status, name=name)
        for label, value in (metadata or {}).items():
            params[f"metadata[{label}]"] = value
        return self._object("GET", "/v1/jobs", params=params)

    def show(self, job_id: str) -> Json:
        """Returns one job."""
        return self._object("GET", f"/v1/jobs/{job_id}")

    def cancel(self, job_id: str) -> Json:
        """Cancels a job and returns its current state; cancelling again is harmless."""
        return self._post(f"/v1/jobs/{job_id}/cancel")

    def cancel_jobs(self, job_ids: Sequence[str]) -> Json:
        """Cancels several jobs; returns which were cancelled, ended before, not found."""
        return self._post("/v1/jobs:cancel", {"ids": list(job_ids)})

    def checkpoint(self, job_id: str) -> Json:
        """Requests a checkpoint of a running job now, and returns the job."""
        return self._post(f"/v1/jobs/{job_id}/checkpoint")

    def request_diagnosis(self, job_id: str) -> Json:
        """Requests that all ranks are examined now, and returns the job."""
        return self._post(f"/v1/jobs/{job_id}/diagnosis")

    def diagnosis(self, job_id: str) -> Json:
        """Returns the newest diagnosis of a job."""
        return self._object("GET", f"/v1/jobs/{job_id}/diagnosis")

    def request_profile(self, job_id: str, steps: str, ranks: Sequence[int]) -> Json:
        """Requests a profile of coming steps, such as `10-12`, and returns it."""
        body = {"steps": steps, "ranks": list(ranks)}
        return self._post(f"/v1/jobs/{job_id}/profiles", body)

    def profiles(self, job_id: str) -> Json:
        """Returns the newest profiles of a job, oldest first."""
        return self._object("GET", f"/v1/jobs/{job_id}/profiles")

    def delete(self, job_id: str) -> None:
        """Deletes an ended job and its history; its files stay."""
        request = self._http.build_request("DELETE", f"/v1/jobs/{job_id}")
        # Repeated after a lost answer it would not find the job, so it is sent once.
        response = self._send(request, repeat=False)
        if response.status_code >= 400:
            raise _refusal(response)

    def pause(self, job_id: str, reason: str = "user_paused") -> Json:
        """Pauses a job and returns its current state; pausing again is harmless."""
        return self._post(f"/v1/jobs/{job_id}/pause", {"reason": reason})

    def resume(self, job_id: str, changes: Mapping[str, Any] | None = None) -> Json:
        """Resumes a paused or ended job and returns its current state.

        `changes` are nested fields of an ended job's spec.
        """
        return self._post(f"/v1/jobs/{job_id}/resume", {"changes": dict(changes or {})})

    def resize(self, job_id: str, dp: int) -> Json:
        """Requests another number of replicas and returns the job's current state."""
        return self._post(f"/v1/jobs/{job_id}/resize", {"dp": dp})

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
        """Returns one page of a job's events, oldest first by default.

        `types` and `levels` are comma-separated lists.
        """
        params = _without_none(limit=limit, after=after, type=types, level=levels)
        if newest_first:
            params["order"] = "desc"
        return self._object("GET", f"/v1/jobs/{job_id}/events", params=params)

    def attempts(self, job_id: str) -> Json:
        """Returns all attempts of a job, oldest first."""
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
        """Returns rows {step, attempt, <keys>}, at most `max_points` of them.

        `keys` is a comma-separated list.
        """
        params = _without_none(
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
        """Returns a part of one rank's log: {data, next_offset, ...}."""
        params = _without_none(rank=rank, attempt=attempt, offset=offset, limit=limit)
        return self._object("GET", f"/v1/jobs/{job_id}/logs", params=params)

    def ranks(self, job_id: str) -> Json:
        """Returns where each rank runs."""
        return self._object("GET", f"/v1/jobs/{job_id}/ranks")

    def checkpoints(self, job_id: str) -> Json:
        """Returns the committed checkpoints, oldest first."""
        return self._object("GET", f"/v1/jobs/{job_id}/checkpoints")

    def cluster(self) -> Json:
        """Returns the clusters with their nodes and agents."""
        return self._object("GET", "/v1/cluster")

    def exclude(self, cluster: str, node: str, reason: str) -> Json:
        """Keeps ranks from starting on a node; returns the cluster."""
        body = {"node": node, "reason": reason}
        return self._post(f"/v1/cluster/{cluster}/exclusions", body)

    def include(self, cluster: str, node: str) -> Json:
        """Lets ranks start on an excluded node again; returns the cluster."""
        return self._object("DELETE", f"/v1/cluster/{cluster}/exclusions/{node}")

    def ready(self) -> tuple[bool, Json]:
        """Returns whether service, agents and Ray are all up, and the body of /readyz.

        Returns (False, {}) when the service does not answer.
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
        """Yields the events of a job until `end`, over as many connections as needed.

        Each connection continues after the last event id received. Raises ServiceError
        when the service refuses, or has been down for `give_up_after_s`.
        """
        last_id = last_event_id
        failures = 0
        last_event_at = time.monotonic()
        while True:
            try:
                with self._open_stream(f"/v1/jobs/{job_id}/stream", last_id) as lines:
                    # The service answers: if anything breaks from here on, it is the
                    # connection, and the next one is made without a longer wait.
                    failures = 0
                    for event in parse_stream(lines):
                        last_id = event.id or last_id
                        last_event_at = time.monotonic()
                        yield event
                        if event.event == "end":
                            return
            except httpx.HTTPError as error:
                if time.monotonic() - last_event_at > give_up_after_s:
                    raise _unreachable(self.url, error) from error
            except ServiceError as error:
                is_too_late = time.monotonic() - last_event_at > give_up_after_s
                if is_too_late or error.status not in _BUSY:
                    raise
            # A stream may also just end, when the service shuts down: that is a failure.
            time.sleep(_STREAM_BACKOFF_S[min(failures, len(_STREAM_BACKOFF_S) - 1)])
            failures += 1

    @contextlib.contextmanager
    def _open_stream(self, path: str, last_event_id: str | None) -> Iterator[Iterator[str]]:
        """Yields the lines of one connection."""
        headers = {"Accept": "text/event-stream"}
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        # Silence for three comments in a row means that the connection is dead.
        timeout = httpx.Timeout(10.0, read=_STREAM_READ_TIMEOUT_S)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if response.status_code != 200:
                response.read()
                raise _refusal(response)
            yield lines_of(response.iter_bytes())

    # ---- one request

    def _post(
        self,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> Json:
        """Sends a POST, which its key makes safe to repeat, and returns the body."""
        headers = {"Idempotency-Key": key or str(uuid.uuid4())}
        return self._object(
            "POST", path, params=params, json=body, headers=headers, repeat=True
        )

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
        """Sends a request and returns the response's body; GET is always repeated."""
        request = self._http.build_request(
            method, path, params=params, json=json, headers=headers
        )
        response = self._send(request, repeat or method == "GET")
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
        # After the last try there is no wait, and neither is there one for a request
        # that might be done twice.
        waits_s = iter(_RETRY_WAITS_S)
        while True:
            wait_s = None
            if repeat:
                wait_s = next(waits_s, None)
            try:
                response = self._http.send(request)
            except httpx.HTTPError as error:
                if wait_s is None:
                    raise _unreachable(self.url, error) from error
            else:
                if wait_s is None or response.status_code not in _BUSY:
                    return response
            time.sleep(wait_s)


def _without_none(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def _body(response: httpx.Response) -> Json:
    try:
        body = response.json()
    except ValueError:
        return {}
    if not isinstance(body, dict):
        return {}
    return body


def _refusal(response: httpx.Response) -> ServiceError:
    """Returns the error of a response; a proxy's has no problem document."""
    body = _body(response)
    errors = []
    for error in body.get("errors") or ():
        problem = Problem(
            pointer=str(error.get("pointer", "")),
            code=str(error.get("code", "")),
            detail=str(error.get("detail", "")),
        )
        errors.append(problem)
    request = response.request
    status = response.status_code
    fallback = f"{request.method} {request.url} answered {status}"
    return ServiceError(
        code=str(body.get("code") or f"http_{status}"),
        detail=str(body.get("detail") or body.get("title") or fallback),
        status=status,
        errors=tuple(errors),
        request_id=body.get("request_id"),
        problem=body,
    )


def _unreachable(url: str, error: Exception) -> ServiceError:
    detail = f"no service answers at {url} ({type(error).__name__}: {error})"
    return ServiceError("unreachable", redacted(detail))
