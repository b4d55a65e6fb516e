"""The client against a scripted transport: what it sends, what it repeats, what it
raises, how it follows a stream.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from service.client import Client, ServiceError
from service.event_stream import StreamEvent, parse_stream

Answer = httpx.Response | Exception


class Script(httpx.BaseTransport):
    """Answers requests in order and remembers them; the last answer repeats."""

    def __init__(
        self, *answers: Answer | Callable[[httpx.Request], httpx.Response]
    ) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer(request) if callable(answer) else answer


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def client_for(script: Script) -> Client:
    return Client("http://service", "secret", transport=script)


def sse(*events: tuple[str, str, Any]) -> httpx.Response:
    text = "".join(
        f"event: {name}\nid: {identity}\ndata: {json.dumps(data)}\n\n"
        for name, identity, data in events
    )
    return httpx.Response(200, text=text, headers={"Content-Type": "text/event-stream"})


def test_submit_sends_token_spec_and_one_key_for_all_tries() -> None:
    script = Script(
        httpx.ConnectError("refused"),
        httpx.Response(503),
        httpx.Response(201, json={"id": "job-1"}),
    )
    assert client_for(script).submit({"name": "a"})["id"] == "job-1"
    keys = {request.headers["Idempotency-Key"] for request in script.requests}
    assert len(script.requests) == 3
    assert len(keys) == 1
    assert script.requests[0].headers["Authorization"] == "Bearer secret"
    assert json.loads(script.requests[0].content) == {"name": "a"}


def test_given_idempotency_key_is_used() -> None:
    script = Script(httpx.Response(201, json={"id": "job-1"}))
    client_for(script).submit({}, idempotency_key="mine")
    assert script.requests[0].headers["Idempotency-Key"] == "mine"


def test_queries_leave_out_what_is_not_given() -> None:
    script = Script(httpx.Response(200, json={"object": "list", "data": []}))
    client = client_for(script)
    client.metrics("job-1", keys="loss,lr", from_step=5)
    client.jobs()
    client.logs("job-1", rank=3, offset=0)
    urls = [str(request.url) for request in script.requests]
    assert urls == [
        "http://service/v1/jobs/job-1/metrics?keys=loss%2Clr&from_step=5",
        "http://service/v1/jobs",
        "http://service/v1/jobs/job-1/logs?rank=3&offset=0",
    ]


def test_problem_json_becomes_one_exception() -> None:
    problem = {
        "type": "about:blank",
        "title": "Invalid",
        "status": 422,
        "detail": "the spec has 1 problem",
        "code": "invalid_spec",
        "request_id": "req-1",
        "errors": [
            {
                "pointer": "/parallel/tp",
                "code": "tp_divides",
                "detail": "tp=3 does not divide 4",
            }
        ],
    }
    script = Script(
        httpx.Response(
            422, json=problem, headers={"Content-Type": "application/problem+json"}
        )
    )
    with pytest.raises(ServiceError) as caught:
        client_for(script).submit({})
    error = caught.value
    assert (error.code, error.status, error.request_id) == ("invalid_spec", 422, "req-1")
    assert error.errors[0].pointer == "/parallel/tp"
    assert str(error) == "the spec has 1 problem"
    assert len(script.requests) == 1, "a refusal is no reason to ask again"


@pytest.mark.parametrize(
    ("status", "code"), [(401, "http_401"), (404, "http_404"), (500, "http_500")]
)
def test_refusal_without_problem_json_still_has_a_code(status: int, code: str) -> None:
    with pytest.raises(ServiceError) as caught:
        client_for(Script(httpx.Response(status, text="<html>"))).show("job-1")
    assert caught.value.code == code
    assert str(status) in caught.value.detail


def test_unreachable_service(no_waiting: list[float]) -> None:
    script = Script(httpx.ConnectError("connection refused"))
    with pytest.raises(
        ServiceError, match=r"no service answers at http://service .*connection refused"
    ) as caught:
        client_for(script).show("job-1")
    assert caught.value.code == "unreachable"
    assert len(script.requests) == 4
    assert no_waiting == [0.2, 0.5, 1.0]


def test_an_answer_that_is_no_object_is_refused() -> None:
    with pytest.raises(ServiceError, match="is that a megatron-ray service"):
        client_for(Script(httpx.Response(200, text="hello"))).cluster()


def test_ready_means_that_agents_and_ray_are_there_too() -> None:
    assert client_for(Script(httpx.Response(200, json={"status": "ok"}))).ready() == (
        True,
        {"status": "ok"},
    )
    assert client_for(Script(httpx.Response(200, json={"status": "degraded"}))).ready() == (
        False,
        {"status": "degraded"},
    )
    assert client_for(
        Script(httpx.Response(503, json={"status": "unavailable"}))
    ).ready() == (
        False,
        {"status": "unavailable"},
    )
    assert client_for(Script(httpx.ConnectError("no"))).ready() == (False, {})


def test_stream_goes_on_after_the_last_event_id() -> None:
    broken = httpx.ReadError("cut")

    def cut_in_the_middle(request: httpx.Request) -> httpx.Response:
        def body() -> Iterator[bytes]:
            yield b'event: state\nid: 1.0\ndata: {}\n\nevent: metrics\nid: 1.5\ndata: {"rows"'
            raise broken

        return httpx.Response(200, content=body())

    script = Script(
        cut_in_the_middle,
        httpx.ConnectError("down"),
        httpx.Response(503),
        sse(("metrics", "1.7", {"rows": []}), ("end", "2.7", {})),
    )
    events = list(client_for(script).stream("job-1"))
    assert [(event.event, event.id) for event in events] == [
        ("state", "1.0"),
        ("metrics", "1.7"),
        ("end", "2.7"),
    ]
    assert [request.headers.get("Last-Event-ID") for request in script.requests] == [
        None,
        "1.0",
        "1.0",
        "1.0",
    ]


def test_stream_backs_off_from_a_service_that_is_away_and_not_from_one_whose_connections_break(
    no_waiting: list[float],
) -> None:
    def cut_at_once(request: httpx.Request) -> httpx.Response:
        def body() -> Iterator[bytes]:
            yield b"event: metr"
            raise httpx.ReadError("cut")

        return httpx.Response(200, content=body())

    away = httpx.ConnectError("down")
    list(
        client_for(
            Script(
                away,
                away,
                away,
                cut_at_once,
                cut_at_once,
                cut_at_once,
                sse(("end", "1.0", {})),
            )
        ).stream("job-1")
    )
    assert no_waiting == [0.1, 0.2, 0.5, 0.1, 0.1, 0.1]


def test_stream_starts_where_it_is_told_to() -> None:
    script = Script(sse(("end", "9.9", {})))
    list(client_for(script).stream("job-1", last_event_id="5.3"))
    assert script.requests[0].headers["Last-Event-ID"] == "5.3"


def test_stream_raises_what_will_not_pass() -> None:
    with pytest.raises(ServiceError) as caught:
        list(
            client_for(
                Script(
                    httpx.Response(
                        404, json={"code": "not_found", "detail": "no job job-1"}
                    )
                )
            ).stream("job-1")
        )
    assert caught.value.code == "not_found"


def test_stream_gives_up_on_a_service_that_stays_away() -> None:
    with pytest.raises(ServiceError) as caught:
        list(
            client_for(Script(httpx.ConnectError("down"))).stream(
                "job-1", give_up_after_s=-1
            )
        )
    assert caught.value.code == "unreachable"


def test_only_line_feeds_end_the_lines_of_a_stream() -> None:
    text = (
        "event: a\r\nid: 1.0\r\ndata: "
        + json.dumps({"m": "x\u2028y\x85z\x1cä"}, ensure_ascii=False)
        + "\n\nevent: end\ndata: {}\n\n"
    )

    def in_small_pieces(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=(bytes([byte]) for byte in text.encode()))

    events = list(client_for(Script(in_small_pieces)).stream("job-1"))
    assert events == [
        StreamEvent("a", "1.0", {"m": "x\u2028y\x85z\x1cä"}),
        StreamEvent("end", "1.0", {}),
    ]


def test_parse_stream() -> None:
    text = ': ping\n\nid: 1\nevent: a\ndata: {"x":\ndata: 1}\n\ndata:2\n\nevent: lost\ndata: {"y"'
    assert list(parse_stream(iter(text.split("\n")))) == [
        StreamEvent("a", "1", {"x": 1}),
        StreamEvent("message", "1", 2),
    ]
