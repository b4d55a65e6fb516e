"""Streams through a network that cuts them and a service that is killed: each reader
gets what the history lists, once.
"""

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import Client, ServiceError
from service.store.metrics import KEYS
from tests.support.cutting_proxy import CuttingProxy
from tests.support.service_process import (
    SPEC,
    Records,
    ServiceProcess,
    free_port,
    job_token,
    post,
    report_nodes,
    step_row,
)

READERS = 3
CUTS = 20
LONG_CUTS = 50
KILL_AT = (0.06, 0.36, 0.7)
"""Shares of the cuts after which the service is killed."""
DEADLINE_S = 120.0
ODD = "line\u2028separators\x85 and ends\x1c\n\r of lines, ümläute"
Json = dict[str, Any]


class Producer(threading.Thread):
    """A driver: two attempts, the second repeating steps; every batch is sent until it
    is stored, wherever the service is.
    """

    def __init__(
        self, service: ServiceProcess, job_id: str, token: str, rng: random.Random
    ) -> None:
        super().__init__(daemon=True)
        self.service = service
        self.records = Records(job_id)
        self.rng = rng
        self.path = f"/internal/v1/jobs/{job_id}/records"
        self.headers = {
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/json",
        }
        self.http = httpx.Client(timeout=5, trust_env=False)
        self.attempt = 1
        self.step = 0
        self.rows = 0
        self.ahead: Callable[[], int] = lambda: 0
        self.second_attempt = threading.Event()
        self.finish = threading.Event()
        self.error: str | None = None

    def history(self) -> None:
        """What there is before anybody reads."""
        self.say(("prepared", {"manifest": {}}), ("state", {"state": "scheduling"}))
        self.begin_attempt()
        for _ in range(40):
            self.work(rows=15)

    def begin_attempt(self) -> None:
        self.say(
            ("attempt", {"state": "starting", "world_size": 4}),
            ("state", {"state": "starting"}),
            ("state", {"state": "running"}),
        )

    def run(self) -> None:
        while not self.finish.wait(0.005):
            if self.second_attempt.is_set() and self.attempt == 1:
                self.say(
                    (
                        "state",
                        {
                            "state": "recovering",
                            "reason": "worker_died",
                            "message": "rank 1 died",
                        },
                    )
                )
                self.say(
                    (
                        "attempt",
                        {
                            "state": "failed",
                            "reason": "worker_died",
                            "message": "rank 1 died",
                        },
                    )
                )
                self.attempt = 2
                self.step = max(0, self.step - 70)
                self.begin_attempt()
            if (
                self.ahead() < 100
                # so that readers come to the live end of the stream, on the slowest machine
                # too
            ):
                self.work(rows=self.rng.randint(3, 15))
        self.say(("attempt", {"state": "succeeded"}), ("state", {"state": "succeeded"}))

    def work(self, rows: int) -> None:
        """Some steps and, now and then, something for the history."""
        first = self.step + 1
        self.step = self.step + rows
        self.rows = self.rows + rows
        self.send(
            f"a{self.attempt}/r0",
            *(step_row(step, self.attempt) for step in range(first, self.step + 1)),
        )
        if self.rng.random() < 0.3:
            self.say(
                (
                    "event",
                    {
                        "type": "test.note",
                        "level": self.rng.choice(("info", "warn")),
                        "message": f"{ODD} {self.step}",
                    },
                )
            )
        if self.rng.random() < 0.1:
            self.say(
                (
                    "checkpoint",
                    {
                        "step": self.step,
                        "path": f"checkpoints/{self.attempt}-{self.step}",
                        "bytes": 7,
                    },
                )
            )

    def say(self, *facts: tuple[str, Json]) -> None:
        self.send("driver", *facts)

    def send(self, source: str, *facts: tuple[str, Json]) -> None:
        batch = self.records.batch(source, self.attempt, *facts)
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            try:
                response = self.http.post(
                    self.service.url + self.path, json=batch, headers=self.headers
                )
            except httpx.HTTPError:
                time.sleep(0.02)  # killed; the next one is on its way
                continue
            if response.status_code != 200:
                self.error = response.text
            assert response.status_code == 200, response.text
            return
        raise AssertionError(f"a batch could not be sent in {DEADLINE_S:.0f} s")


class Reader(threading.Thread):
    """A user's client behind a bad network; keeps all that it was given, in order."""

    def __init__(
        self,
        service: ServiceProcess,
        job_id: str,
        rng: random.Random,
        known_events: int,
        known_rows: int,
        cuts: int,
    ) -> None:
        super().__init__(daemon=True)
        self.proxy = CuttingProxy(lambda: service.address, rng, cuts, self.was_cut)
        self.service = service
        self.job_id = job_id
        self.known = (known_events, known_rows)
        self.events: list[Json] = []
        self.rows: list[Json] = []
        self.ended = False
        self.cuts_in_replay = self.cuts_live = 0
        self.error: BaseException | None = None

    def was_cut(self) -> None:
        if (len(self.events), len(self.rows)) >= self.known and len(
            self.rows
        ) >= self.known[1]:
            self.cuts_live += 1
        else:
            self.cuts_in_replay += 1

    def run(self) -> None:
        try:
            with self.proxy, Client(self.proxy.url, self.service.user_token) as client:
                for event in client.stream(self.job_id):
                    if event.event == "metrics":
                        self.rows += event.data["rows"]
                    elif event.event == "end":
                        self.ended = True
                    elif event.event != "state":
                        assert event.data["type"] == event.event
                        self.events.append(event.data)
        except (
            ServiceError,
            AssertionError,
            ValueError,
            KeyError,
        ) as error:  # shown by the test, which is in another thread
            self.error = error


@pytest.fixture
def rng() -> random.Random:
    seed = int(
        os.environ.get("MEGATRON_RAY_SEED") or random.SystemRandom().randrange(1 << 31)
    )
    sys.stdout.write(f"streams: MEGATRON_RAY_SEED={seed}\n")
    return random.Random(seed)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path) as started:
        yield started


@pytest.mark.parametrize("cuts", [CUTS, pytest.param(LONG_CUTS, marks=pytest.mark.chaos)])
def test_readers_cut_many_times_each_receive_the_history_once(
    service: ServiceProcess, rng: random.Random, cuts: int
) -> None:
    with (
        service.client(service.user_token) as user,
        service.client(service.agent_token) as agent,
    ):
        report_nodes(agent)
        job_id = post(user, "/v1/jobs", SPEC)["id"]
        producer = Producer(
            service, job_id, job_token(agent, job_id), random.Random(rng.random())
        )
        producer.history()
        known = len(
            user.get(f"/v1/jobs/{job_id}/events", params={"limit": 1000}).json()["data"]
        )
    readers = [
        Reader(service, job_id, random.Random(rng.random()), known, producer.step, cuts)
        for _ in range(READERS)
    ]
    producer.ahead = lambda: producer.rows - min(len(reader.rows) for reader in readers)
    threads: list[threading.Thread] = [producer, *readers]
    for thread in threads:
        thread.start()
    try:
        for number, share in enumerate(KILL_AT):
            wait_for(partial(all_cut, readers, int(share * cuts)), readers, producer)
            port = service.address[1]
            service.kill()
            service.start(port if number == 1 else free_port())
            if number == 1:
                producer.second_attempt.set()
        wait_for(
            lambda: fewest_cuts(readers) >= cuts and producer.attempt == 2,
            readers,
            producer,
        )
    finally:
        producer.finish.set()
    wait_for(lambda: not any(thread.is_alive() for thread in threads), readers, producer)
    producer.http.close()

    with Client(service.url, service.user_token) as client:
        events = [event for page in pages(client, job_id) for event in page]
        rows = [
            row
            for attempt in (1, 2)
            for row in client.metrics(job_id, keys=",".join(KEYS), attempt=attempt)["data"]
        ]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert len(rows) > 12 * cuts
    assert any(ODD in event["message"] for event in events)
    for reader in readers:
        assert reader.error is None
        assert reader.ended
        assert reader.events == events
        assert sorted(reader.rows, key=key) == sorted(rows, key=key)
        assert reader.proxy.cuts == cuts, vars(reader)
        assert reader.cuts_in_replay >= 3, vars(reader)
        assert reader.cuts_live >= 3, vars(reader)


def key(row: Json) -> tuple[int, int]:
    return row["attempt"], row["step"]


def pages(client: Client, job_id: str) -> Iterator[list[Json]]:
    after = None
    while True:
        page = client.events(job_id, limit=100, after=after)
        yield page["data"]
        if not page["has_more"]:
            return
        after = page["last_id"]


def fewest_cuts(readers: list[Reader]) -> int:
    return min(reader.proxy.cuts for reader in readers)


def all_cut(readers: list[Reader], cuts: int) -> bool:
    return fewest_cuts(readers) >= cuts


def wait_for(
    reached: Callable[[], bool], readers: list[Reader], producer: Producer
) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        state = [
            (reader.proxy.cuts, len(reader.events), len(reader.rows), reader.error)
            for reader in readers
        ]
        assert time.monotonic() < deadline, (
            f"not reached in {DEADLINE_S:.0f} s: {state}, {producer.error}"
        )
        assert producer.is_alive() or producer.finish.is_set(), "the producer has died"
        assert producer.error is None, (state, producer.error)
        assert not any(reader.error for reader in readers), state
        time.sleep(0.02)
