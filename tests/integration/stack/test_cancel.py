"""A job is cancelled in each of its states: it ends in time, with a last checkpoint
where there was something to save.
"""

import gzip
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
import yaml

from megatron_ray.reports import STEP_PARTS
from tests.support.fault_injection import (
    Observer,
    assert_nothing_left,
    busy_workers,
    dice,
    history,
    kill,
    observed,
    story,
    until,
)
from tests.support.running_stack import Road
from workers.driver.gauges import GAUGES

pytestmark = pytest.mark.ray

DEMO = Path(__file__).parents[3] / "deploy/jobs/stdlib-tp2.yaml"
GRACE_S = 60.0
DEMO_S = 5.0


@pytest.fixture(scope="module")
def observer(road: Road) -> Iterator[Observer]:
    with observed(road) as observing:
        yield observing


def endless(road: Road, **groups: Any) -> dict[str, Any]:
    """A job that ends only when it is cancelled, and writes no checkpoint by itself."""
    return road.spec(
        training={"steps": 100_000},
        checkpoint={"every_steps": 100_000},
        restart={"backoff_s": 0.2},
        **groups,
    )


@contextmanager
def preparing(road: Road, observer: Observer) -> Iterator[str]:
    """Megabytes to learn a vocabulary from take their time."""
    words = random.Random(7)
    path = road.corpus.parent / f"large-{time.monotonic_ns()}.txt"
    path.write_text(
        " ".join(
            "".join(words.choices("abcdefghij", k=words.randint(3, 9)))
            for _ in range(400_000)
        )
    )
    job_id = road.client.submit(
        road.spec(
            data={
                "train": [{"path": str(path)}],
                "tokenizer": {"kind": "bpe", "vocab_size": 8192},
            }
        )
    )["id"]
    until(
        "the task that prepares the data",
        lambda: any("prepare" in title for _, title in busy_workers(road)),
        60,
    )
    yield job_id


@contextmanager
def queued(road: Road, observer: Observer) -> Iterator[str]:
    """Another job has the room."""
    holder = road.client.submit(endless(road))["id"]
    road.wait(holder, lambda job: job["status"] in ("scheduling", "starting", "running"))
    job_id = road.client.submit(endless(road))["id"]
    road.wait(job_id, lambda job: job["status"] == "queued")
    yield job_id
    cancel(road, holder)
    assert road.finish(holder)["status"] == "cancelled"


@contextmanager
def scheduling(road: Road, observer: Observer) -> Iterator[str]:
    """A process unknown to the service has a CPU."""
    observer.hold()
    try:
        job_id = road.client.submit(endless(road))["id"]
        until(
            "a job that waits for room", lambda: seen(road, job_id, "placement.waiting"), 60
        )
        yield job_id
    finally:
        observer.release()


@contextmanager
def starting(road: Road, observer: Observer) -> Iterator[str]:
    job_id = road.client.submit(endless(road))["id"]
    until("starting", lambda: seen(road, job_id, "job.starting"), 60)
    yield job_id


@contextmanager
def running(road: Road, observer: Observer) -> Iterator[str]:
    job_id = road.client.submit(endless(road))["id"]
    road.step(job_id, 5)
    yield job_id


@contextmanager
def recovering(road: Road, observer: Observer) -> Iterator[str]:
    with running(road, observer) as job_id:
        kill(road.pids(job_id)[1])
        road.wait(job_id, lambda job: job["status"] == "recovering")
        yield job_id


@contextmanager
def cancelling(road: Road, observer: Observer) -> Iterator[str]:
    with running(road, observer) as job_id:
        cancel(road, job_id)
        yield job_id


STATES: dict[str, Callable[[Road, Observer], Any]] = {
    state.__name__: state
    for state in (preparing, queued, scheduling, starting, running, recovering, cancelling)
}


def seen(road: Road, job_id: str, kind: str) -> bool:
    return any(event["type"] == kind for event in history(road, job_id))


def cancel(road: Road, job_id: str, **body: Any) -> None:
    """As a user does; without a body, or with one."""
    url = f"{road.record.url}/v1/jobs/{job_id}/cancel"
    assert (
        httpx.post(
            url, json=body or None, headers=road.headers, timeout=20, trust_env=False
        ).status_code
        == 202
    )


def end(road: Road, observer: Observer, job_id: str, **body: Any) -> float:
    """Cancels a job, and sees that it ends as it should with nothing left; seconds that
    it took.
    """
    before = road.client.show(job_id)["status"]
    started = time.monotonic()
    cancel(road, job_id, **body)
    job = road.finish(job_id)
    seconds = time.monotonic() - started
    log = story(road, job_id)
    assert job["status"] == "cancelled", log
    assert job["status_reason"] == "user_cancelled", log
    assert seconds <= GRACE_S, log
    if before == "running":
        last = job["last_checkpoint"]
        rows = road.rows(job_id)
        if body.get("checkpoint", True):
            assert last is not None, log
            assert last["step"] == rows[-1]["step"], log
        else:
            assert last is None, log
    assert_nothing_left(road, observer, [job_id])
    sys.stdout.write(f"cancelled in {seconds:.2f} s from {before} {body or ''}\n")
    return seconds


@pytest.mark.parametrize("state", [state for state in STATES if state != "running"])
def test_from_each_state(road: Road, observer: Observer, state: str) -> None:
    with STATES[state](road, observer) as job_id:
        assert road.client.show(job_id)["status"] == state
        end(road, observer, job_id)


def test_while_running_on_rays_metrics_port_and_with_a_log_in_rays_dashboard(
    road: Road, observer: Observer
) -> None:
    with running(road, observer) as job_id:
        rank = road.client.ranks(job_id)["data"][1]
        assert_log_opens(road, rank["log_url"])
        labels = f'job_id="{job_id}"'
        until("the gauges", lambda: labels in metrics(road), 40)
        lines = [line for line in metrics(road).splitlines() if labels in line]
        names = {line.partition("{")[0] for line in lines}
        assert names == {f"ray_{gauge.name}" for gauge in GAUGES.values()}
        parts = set(re.findall(r'part="(\w+)"', "\n".join(lines)))
        assert parts == set(STEP_PARTS)
        assert all('group="trainer"' in line for line in lines)
        assert_profiled(road, job_id)
        assert road.client.show(job_id)["status"] == "running"
        end(road, observer, job_id)


def assert_profiled(road: Road, job_id: str) -> None:
    """Both ranks record the same coming step of a job that trains."""
    step = road.client.show(job_id)["progress"]["step"] + 200
    requested = road.client.request_profile(job_id, str(step), [0, 1])
    (written,) = until(
        "the profile",
        lambda: [
            entry
            for entry in road.client.profiles(job_id)["data"]
            if entry["status"] != "pending"
        ],
        120,
    )
    assert (written["id"], written["status"]) == (requested["id"], "written")
    for rank, report in enumerate(written["reports"]):
        assert report["operators"][0]["calls"] > 0
        trace, _ = report["files"]
        with gzip.open(Path(written["folder"], trace), "rt") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert f"step {step}" in names, rank
    assert seen(road, job_id, "job.profiled")


def metrics(road: Road) -> str:
    """What Prometheus reads from Ray's only node."""
    port = road.record.ports["ray_metrics"]
    return httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text


def assert_log_opens(road: Road, url: str) -> None:
    """Reads the file as the dashboard's page does."""
    page, _, query = url.partition("/#/logs/viewer?")
    assert page == road.record.dashboard_url
    names = parse_qs(query)
    reply = httpx.get(
        f"{page}/api/v0/logs/file",
        params={"node_id": names["nodeId"][0], "filename": names["fileName"][0]},
        headers={"Authorization": f"Bearer {road.record.ray_token}"},
        timeout=20,
        trust_env=False,
    )
    assert reply.status_code == 200
    assert "rank 1 of 2, attempt 1" in reply.text


@pytest.mark.chaos
def test_without_a_last_checkpoint(road: Road, observer: Observer) -> None:
    with running(road, observer) as job_id:
        end(road, observer, job_id, checkpoint=False)


# ---- the long forms


@pytest.mark.chaos
@pytest.mark.parametrize("number", range(20))
def test_at_any_moment(road: Road, observer: Observer, number: int) -> None:
    chance = dice(f"cancel {number}")
    state = list(STATES)[number % len(STATES)]
    body = chance.choice(({}, {"checkpoint": True}, {"checkpoint": False}))
    delay_s = chance.uniform(0.0, 1.5)
    with ExitStack() as stack:
        job_id = stack.enter_context(STATES[state](road, observer))
        time.sleep(delay_s)
        sys.stdout.write(f"{delay_s:.2f} s after {state}: ")
        end(road, observer, job_id, **({} if state == "cancelling" else body))


@pytest.mark.chaos
def test_the_demos_spec_ends_quickly(road: Road, observer: Observer) -> None:
    chance = dice("cancel the demo")
    spec = {**yaml.safe_load(DEMO.read_text())}
    taken = []
    for _ in range(5):
        job_id = road.client.submit(spec)["id"]
        road.wait(job_id, lambda job: job["status"] == "running", 600)
        road.step(job_id, chance.randint(1, 20))
        taken.append(end(road, observer, job_id))
    sys.stdout.write(
        f"seconds from POST to cancelled: {[round(seconds, 2) for seconds in taken]}\n"
    )
    assert max(taken) <= DEMO_S
