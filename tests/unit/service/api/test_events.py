"""The event stream: every event and row once, whatever happens to the connection."""

import json
import logging
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

Message = dict[str, Any]


def messages(response: httpx.Response) -> Iterator[Message]:
    """Complete server-sent events and comments; whatever is cut in the middle is
    dropped, as a browser does.
    """
    buffer = ""
    for text in response.iter_text():
        buffer += text
        while "\n\n" in buffer:
            block, buffer = buffer.split("\n\n", 1)
            message: Message = {}
            for line in block.split("\n"):
                if line.startswith(":"):
                    message["comment"] = line[2:]
                else:
                    name, value = line.split(": ", 1)
                    message[name] = value
            yield message


class Reader:
    """Keeps what it has seen and where it is."""

    def __init__(self, service: Any, job_id: str) -> None:
        self.service = service
        self.job_id = job_id
        self.seqs: list[int] = []
        self.rows: list[tuple[int, int]] = []
        self.last_id: str | None = None
        self.ended = False
        self.states: list[Message] = []

    def read(self, most_messages: int | None = None) -> None:
        headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
        with self.service.user.stream(
            "GET", f"/v1/jobs/{self.job_id}/stream", headers=headers
        ) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            for count, message in enumerate(messages(response), start=1):
                self.take(message)
                if self.ended or count == most_messages:
                    return

    def take(self, message: Message) -> None:
        self.last_id = message.get("id", self.last_id)
        if "comment" in message:
            return
        data = json.loads(message["data"])
        if message["event"] == "metrics":
            self.rows += [(row["attempt"], row["step"]) for row in data["rows"]]
        elif message["event"] == "state":
            self.states.append(data)
        elif message["event"] == "end":
            self.ended = True
        else:
            assert data["type"] == message["event"]
            assert data["object"] == "job.event"
            self.seqs.append(data["seq"])


def test_history_is_replayed_then_ends(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.steps(1, 2500)
    driver.states("succeeded", attempt=1)
    reader = Reader(service, job_id)
    reader.read()
    assert reader.ended
    assert reader.rows == [(1, step) for step in range(1, 2501)]
    assert reader.seqs == list(range(1, len(service.events(job_id)) + 1))
    assert reader.states[-1]["status"] == "succeeded"
    assert "spec" not in reader.states[-1]
    again = Reader(service, job_id)
    again.last_id = reader.last_id
    again.read()
    assert again.ended
    assert again.rows == []
    assert again.seqs == []


def test_cut_anywhere_and_resumed_every_event_and_row_comes_once(
    service: Any, make_step: Any
) -> None:
    job_id, driver = service.running_job()
    rng = random.Random(11)

    def work() -> None:
        for step in range(1, 601, 5):
            attempt = 1 + step // 200
            driver.send(
                *(("step", make_step(s)) for s in range(step, step + 5)),
                source=f"a{attempt}/r0",
                attempt=attempt,
            )
            if rng.random() < 0.3:
                driver.send(
                    ("event", {"type": "test.note", "message": str(step)}), attempt=attempt
                )
            if rng.random() < 0.1:
                time.sleep(0.02)
        driver.states("succeeded", attempt=4)

    thread = threading.Thread(target=work)
    thread.start()
    reader = Reader(service, job_id)
    connections = 0
    cutting = random.Random(5)
    while not reader.ended:
        reader.read(cutting.randint(1, 25))
        connections += 1
    thread.join(10)
    total = service.events(job_id)[-1]["seq"]
    assert reader.seqs == list(range(1, total + 1))
    assert sorted(reader.rows) == sorted(expected_rows())
    assert connections > 10


def expected_rows() -> list[tuple[int, int]]:
    return [
        (1 + first // 200, step)
        for first in range(1, 601, 5)
        for step in range(first, first + 5)
    ]


def test_resume_over_a_restart_of_the_service(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.steps(1, 10)
    reader = Reader(service, job_id)
    reader.read(4)
    token = driver.http.headers["Authorization"].removeprefix("Bearer ")
    service.restart()
    driver.http = service.client(token)
    driver.steps(11, 20)
    driver.states("succeeded", attempt=1)
    while not reader.ended:
        reader.read()
    assert reader.seqs == list(range(1, service.events(job_id)[-1]["seq"] + 1))
    assert sorted(reader.rows) == [(1, step) for step in range(1, 21)]


def test_new_things_arrive_at_once_and_silence_is_filled_with_pings(service: Any) -> None:
    job_id, driver = service.running_job()
    arrived: list[float] = []
    with service.user.stream("GET", f"/v1/jobs/{job_id}/stream") as response:
        stream = messages(response)
        while "comment" not in next(stream):
            pass
        for step in range(1, 6):
            began = time.monotonic()
            driver.steps(step, step)
            while next(stream).get("event") != "metrics":
                pass
            arrived.append(time.monotonic() - began)
    assert sorted(arrived)[2] < 0.4, "woken, not polled: pings are 0.5 s apart"


def test_positions_that_make_no_sense_are_refused(service: Any) -> None:
    job_id = service.submit()["id"]
    for wrong in ("abc", "1.2.3", "-1", "9" * 40):
        response = service.user.get(
            f"/v1/jobs/{job_id}/stream", headers={"Last-Event-ID": wrong}
        )
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == "/header/Last-Event-ID"
        assert "start from the beginning" in response.json()["detail"]


def test_position_may_come_in_the_query(service: Any) -> None:
    job_id = service.submit()["id"]
    service.user.post(f"/v1/jobs/{job_id}/cancel")
    with service.user.stream(
        "GET", f"/v1/jobs/{job_id}/stream", params={"after": f"{job_id}.2.0"}
    ) as response:
        later = list(messages(response))
    assert [message["event"] for message in later] == [
        "job.cancelled",
        "state",
        "end",
    ]
    assert later[0]["id"] == f"{job_id}.3.0"


def test_too_many_streams_are_refused_and_places_come_free(
    start: Any, settings: Any
) -> None:
    service = start(settings.model_copy(update={"max_streams": 1}))
    job_id = service.submit()["id"]
    with service.user.stream("GET", f"/v1/jobs/{job_id}/stream") as first:
        open_stream = messages(first)  # dropping it would close the connection
        assert next(open_stream)["event"] == "job.created"
        refused = service.user.get(f"/v1/jobs/{job_id}/stream")
        assert refused.status_code == 429
        assert refused.json()["code"] == "too_many_streams"
        assert refused.headers["Retry-After"] == "5"
    deadline = time.monotonic() + 5
    service.user.post(f"/v1/jobs/{job_id}/cancel")
    while (answer := service.user.get(f"/v1/jobs/{job_id}/stream")).status_code == 429:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert answer.status_code == 200


def test_shutdown_with_open_streams_and_polls_is_prompt(service: Any) -> None:
    job_id, _ = service.running_job()
    seen = threading.Event()
    ends: list[bool] = []

    def follow() -> None:
        with service.client("u" * 43).stream(
            "GET", f"/v1/jobs/{job_id}/stream"
        ) as response:
            for message in messages(response):
                seen.set()
                ends.append(message.get("event") == "end")

    threads = [
        threading.Thread(target=follow),
        threading.Thread(
            target=lambda: service.agent.desired(service.agent.desired().revision, 30)
        ),
    ]
    for thread in threads:
        thread.start()
    assert seen.wait(5)
    time.sleep(0.2)
    began = time.monotonic()
    service._server.should_exit = True
    service._thread.join(10)
    assert time.monotonic() - began < 1.5
    assert not any(ends)
    for thread in threads:
        thread.join(5)


def test_deleting_a_job_ends_its_streams(service: Any) -> None:
    job_id = service.submit()["id"]
    with service.user.stream("GET", f"/v1/jobs/{job_id}/stream") as response:
        stream = messages(response)
        next(stream)
        service.client("u" * 43).post(f"/v1/jobs/{job_id}/cancel")
        assert [message["event"] for message in stream if "event" in message][-1] == "end"


def test_readers_that_leave_in_the_middle_of_a_message_are_no_errors(
    service: Any, caplog: pytest.LogCaptureFixture
) -> None:
    job_id, driver = service.running_job()
    driver.steps(1, 2500)
    host, port = service.url.removeprefix("http://").split(":")
    request = (
        f"GET /v1/jobs/{job_id}/stream HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: {service.user.headers['Authorization']}\r\n\r\n"
    )
    for number in range(20):
        with socket.create_connection((host, int(port))) as reader:
            reader.sendall(request.encode())
            assert reader.recv(100 * (number + 1))
            # Closed with a reset, while the service goes on sending.
            linger = struct.pack("ii", 1, 0)
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    deadline = time.monotonic() + 20
    while service.app.state.context.telemetry.open_streams:
        assert time.monotonic() < deadline, "a stream without a reader goes on"
        time.sleep(0.02)
    driver.states("succeeded", attempt=1)
    assert [entry for entry in caplog.records if entry.levelno >= logging.WARNING] == []
