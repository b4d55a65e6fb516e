"""No body stops the service: answers stay small and quick, and the event loop goes on."""

import asyncio
import gc
import json
import random
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.exceptions import MAX_ERRORS
from service.http.bodies import MAX_DEPTH, MAX_MEMBERS, MAX_VALUES
from service.settings import Settings

Json = dict[str, Any]
BODY_BYTES = 1 << 20
ANSWER_BYTES = 256 << 10
ANSWER_S = 0.2
PAUSE_S = 0.05
PATHS = ("/v1/jobs", "/v1/plans", "/v1/plans/suggest", "/v1/jobs/job-x/cancel")


def assert_refused(response: httpx.Response, status: int) -> Json:
    assert response.status_code == status, response.text[:300]
    assert len(response.content) <= ANSWER_BYTES
    body: Json = response.json()
    return body


def test_of_errors_without_end_the_first_are_listed(service: Any, spec: Json) -> None:
    spec["model"] |= {f"unknown-{number}": number for number in range(1000)}
    for path in ("/v1/jobs", "/v1/plans"):
        problem = assert_refused(service.user.post(path, json=spec), 422)
        assert len(problem["errors"]) == MAX_ERRORS
        assert problem["errors"][0]["pointer"] == "/model/unknown-0"
        assert "(and 999 more, of which the first are listed)" in problem["detail"]
    body = {f"unknown-{number}": number for number in range(1000)}
    problem = assert_refused(service.user.post("/v1/jobs/job-x/cancel", json=body), 422)
    assert len(problem["errors"]) == MAX_ERRORS


def test_errors_of_rules_are_bounded_too(service: Any, spec: Json) -> None:
    spec["data"]["train"] = [{"path": f"s3://{'x' * 4000}?"} for _ in range(200)]
    problem = assert_refused(service.user.post("/v1/jobs", json=spec), 422)
    assert len(problem["errors"]) == MAX_ERRORS
    assert "(and 199 more" in problem["detail"]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([0] * (MAX_VALUES + 1), f"more than {MAX_VALUES:,} values"),
        ({"data": {"train": [0] * (MAX_MEMBERS + 1)}}, "has 1,025 members, and at most"),
        ({str(key): 0 for key in range(MAX_MEMBERS + 1)}, "has 1,025 members, and at most"),
        ({"model": nested(MAX_DEPTH)}, f"more than {MAX_DEPTH} levels deep"),
        ({"model": nested(900)}, f"more than {MAX_DEPTH} levels deep"),
    ],
)
def test_bodies_without_measure_are_not_validated(
    service: Any, body: Any, words: str
) -> None:
    for path in PATHS:
        response = service.user.post(path, json=body)
        assert words in assert_refused(response, 400)["detail"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (r'{"name": "\ud83d\ude00 \uD800"}', 400, "is one half of a character; write the"),
        (r'{"\udc00": 1}', 400, "is one half of a character; write the character"),
        (r'{"metadata": {"a": "\ud83d\ude00"}}', 422, "/model: model is required"),
        ('{"a": 1, "a": 2}', 400, "the key 'a' is given twice; keep one of them"),
        (f'{{"training": {{"steps": {"9" * 5000}}}}}', 422, "with fewer digits, got '999"),
    ],
)
def test_values_that_would_be_lost_are_refused(
    service: Any, body: str, status: int, words: str
) -> None:
    for path in ("/v1/jobs", "/v1/plans"):
        response = service.user.post(
            path, content=body, headers={"Content-Type": "application/json"}
        )
        assert words in assert_refused(response, status)["detail"] + response.text


def test_the_largest_spec_is_taken(service: Any, spec: Json) -> None:
    source = {"path": "builtin://python-stdlib", "weight": 1.5, "text_key": "text"}
    spec["data"] |= {"train": [source] * 1024, "validation": [source] * 1024}
    response = service.user.post("/v1/plans", json=spec)
    assert response.status_code == 200, response.text[:500]


# ---- many of them, in one event loop


@dataclass
class Measured:
    """The worst of many requests, in time of this process: a busy machine adds nothing."""

    answer_bytes: int = 0
    answer_s: float = 0.0
    pause_s: float = 0.0
    statuses: dict[int, int] = field(default_factory=dict)


def hostile_bodies(spec: Json, rng: random.Random) -> Iterator[bytes]:
    """Yields bodies of up to the limit, of every kind in turn."""
    kinds: list[Callable[[int], Any]] = [
        lambda size: spec | {f"u{index}": index for index in range(size // 12)},
        lambda size: spec | {"data": {"train": [None] * (size // 6)}},
        lambda size: spec | {"data": {"train": [{"x": 0}] * min(1024, size // 12)}},
        lambda size: (
            spec | {"data": {"train": [{"path": None, "a": 1, "b": {}, "c": []}] * 1000}}
        ),
        lambda size: spec | {"x" * size: 1},
        lambda size: spec | {"name": "é" * (size // 6)},
        lambda size: spec | {"metadata": {"\x01" * (size // 1200): 1} | metadata(200)},
        lambda size: spec | {"model": nested(min(size // 2, 900))},
        lambda size: spec | {"parallel": {str(index): [] for index in range(size // 20)}},
        lambda size: [spec] * (size // 400),
        lambda size: (
            spec | {"credentials": ["s3://K:S@b/?x" * 20] * min(1024, size // 300)}
        ),
        lambda size: (
            spec
            | {"data": {"train": [{"path": "s3://K:S@b/" + "%2e" * 1000}] * (size // 3100)}}
        ),
        lambda size: spec | {"data": {"train": [{"path": "x"}] * min(1024, size // 30)}},
        lambda size: spec | {"training": {"steps": "1" * size}},
        lambda size: spec | {"optimizer": {"lr": "1" * size}},
        lambda size: "x" * size,
        lambda size: dict.fromkeys(spec, "x" * (size // 10)),
    ]
    while True:
        for kind in kinds:
            body = json.dumps(kind(rng.randrange(1000, BODY_BYTES - 2000))).encode()
            yield body[:BODY_BYTES]
        yield b"[" * rng.randrange(BODY_BYTES)
        yield b'{"a":' * rng.randrange(BODY_BYTES // 6)
        yield rng.randbytes(rng.randrange(BODY_BYTES))


def metadata(count: int) -> Json:
    return {str(index): index for index in range(count)}


async def send_hostile(app: FastAPI, token: str, spec: Json, count: int) -> Measured:
    measured = Measured()
    transport = httpx.ASGITransport(app)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    bodies = hostile_bodies(spec, random.Random(1))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=transport, base_url="http://service", headers=headers, verify=False
        ) as client,
    ):
        for number in range(count):
            body = next(bodies)
            watching = asyncio.create_task(watch(measured))
            await asyncio.sleep(0)
            started = time.process_time()
            response = await client.post(PATHS[number % len(PATHS)], content=body)
            seconds = time.process_time() - started
            watching.cancel()
            measured.answer_s = max(measured.answer_s, seconds)
            measured.answer_bytes = max(measured.answer_bytes, len(response.content))
            before = measured.statuses.get(response.status_code, 0)
            measured.statuses[response.status_code] = before + 1
    return measured


async def watch(measured: Measured) -> None:
    """Notes the longest time in which the event loop ran nothing else."""
    while True:
        started = time.process_time()
        await asyncio.sleep(0.001)
        measured.pause_s = max(measured.pause_s, time.process_time() - started)


@pytest.fixture
def frozen_heap() -> Iterator[None]:
    """Leaves what was imported out of collections, as the service's process does."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.usefixtures("frozen_heap")
@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.chaos)])
def test_hostile_bodies_cost_little(settings: Settings, spec: Json, count: int) -> None:
    token = json.loads((settings.tokens_file or settings.data_dir).read_text())["user"]
    app = create_app(settings)
    asyncio.run(send_hostile(app, token, spec, 20))
    before = resident_bytes()
    measured = asyncio.run(send_hostile(create_app(settings), token, spec, count))
    assert set(measured.statuses) <= {400, 404, 413, 422}, measured
    assert measured.answer_bytes <= ANSWER_BYTES, measured
    assert measured.answer_s <= ANSWER_S, measured
    assert measured.pause_s <= PAUSE_S, measured
    assert resident_bytes() - before <= 32 << 20
