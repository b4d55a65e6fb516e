"""Seconds from a SIGKILL to work going on: of a rank, to the next new step; of the service, to serving again."""

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.integration.road import Road, stack

KILLS = 10
GOALS = {"rank": 5.0, "service": 3.0}


def run() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="bench-road-") as folder, stack(Path(folder)) as road:
        for case, kill in {"rank": kill_rank, "service": kill_service}.items():
            spec = road.spec(training={"steps": 100_000}, checkpoint={"every_steps": 20}, restart={"max_failures": 1000, "backoff_s": 0})
            job_id = road.client.submit(spec)["id"]
            road.wait(job_id, lambda job: job["last_checkpoint"] is not None)
            seconds = [kill(road, job_id) for _ in range(KILLS)]
            road.client.cancel(job_id)
            road.finish(job_id)
            low, middle, high = statistics.quantiles(seconds, n=4)
            yield {
                "bench": "recovery",
                "case": case,
                "value": round(middle, 2),
                "unit": "seconds from SIGKILL to going on",
                "baseline": None,
                "goal": GOALS[case],
                "quartiles": [round(low, 2), round(high, 2)],
                "worst": round(max(seconds), 2),
            }


def kill_rank(road: Road, job_id: str) -> float:
    """The last rank dies; over when the newest step there is comes from the next attempt, so beyond all that was done before."""
    job = road.client.show(job_id)
    attempt, reached = job["attempt"], job["progress"]["step"]
    os.kill(road.pids(job_id)[-1], signal.SIGKILL)
    started = time.monotonic()
    until(lambda: road.client.metrics(job_id, from_step=reached)["data"][-1]["attempt"] > attempt)
    taken = time.monotonic() - started
    road.step(job_id, road.client.show(job_id)["progress"]["step"] + 25)  # past the next checkpoint: no crash loop
    return taken


def kill_service(road: Road, job_id: str) -> float:
    """Over when the API answers again."""
    before = road.service_session()
    os.kill(before.sid, signal.SIGKILL)
    started = time.monotonic()
    until(lambda: road.service_session() != before and answers(road))
    taken = time.monotonic() - started
    time.sleep(3)  # `up` waits longer before each restart in a row
    return taken


def answers(road: Road) -> bool:
    try:
        return httpx.get(f"{road.record.url}/healthz", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not go on in 120 s")
        time.sleep(0.02)
