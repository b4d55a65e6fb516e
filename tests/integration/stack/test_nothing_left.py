"""Jobs end in every way there is; afterwards Ray holds nothing of them, the database
has no open row, and no process has grown.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_injection import (
    Observer,
    assert_nothing_left,
    history,
    kill,
    kill_session,
    observed,
    open_rows,
    session,
    story,
    until,
)
from tests.support.running_stack import ENDS, Road
from tests.support.service_process import open_files

pytestmark = pytest.mark.ray

JOBS = 50
SHORT_JOBS = 200
FIRST_LOOK = 50
MOST_GROWTH = 0.10
"""Of resident memory from the first look to the last: caches and heaps settle within
the first jobs, and what is kept per job (rows of history in a cache, say, or a leaked
object) would add up over three times as many jobs again."""
GROWTH_FLOOR_BYTES = 8 << 20
"""Less than this is the allocator's, whatever the process' size."""

Way = Callable[[Road, Observer], str]
"""Starts a job and does something to it; returns its id."""


@pytest.fixture(scope="module")
def observer(road: Road) -> Iterator[Observer]:
    with observed(road) as observing:
        yield observing


def short(road: Road, steps: int = 4, **groups: Any) -> dict[str, Any]:
    """One rank, few steps."""
    training = {"steps": steps, "global_batch_size": 4, **groups.pop("training", {})}
    restart = {"backoff_s": 0.1, **groups.pop("restart", {})}
    return road.spec(
        parallel={"tp": 1, "sequence_parallel": False},
        training=training,
        restart=restart,
        **groups,
    )


def submit(road: Road, spec: dict[str, Any]) -> str:
    return str(road.client.submit(spec)["id"])


def endless(road: Road, **groups: Any) -> str:
    """A job that is training and does not end by itself."""
    job_id = submit(
        road, short(road, 100_000, checkpoint={"every_steps": 100_000}, **groups)
    )
    road.step(job_id, 2)
    return job_id


def happened(road: Road, job_id: str, kind: str) -> None:
    until(kind, lambda: any(row["type"] == kind for row in history(road, job_id)), 60)


def kill_role(observer: Observer, job_id: str, role: str) -> None:
    kill(int(until(f"a living {role}", lambda: observer.actors(job_id).get(role), 60)))


def succeeds(road: Road, observer: Observer) -> str:
    return submit(road, short(road))


def is_mistaken(road: Road, observer: Observer) -> str:
    """The data are gone when they are looked at closely."""
    path = road.corpus.parent / "gone.txt"
    path.write_text("here for a moment only " * 2000)
    job_id = submit(road, short(road, data={"train": [{"path": str(path)}]}))
    path.unlink()
    return job_id


def diverges(road: Road, observer: Observer) -> str:
    return submit(
        road, short(road, 100, optimizer={"lr": 100.0, "weight_decay": 1.0})
    )  # weights grow a hundredfold per step


def spends_its_budget(road: Road, observer: Observer) -> str:
    job_id = endless(road, restart={"max_failures": 0})
    kill_role(observer, job_id, "w0")
    return job_id


def crashes_in_a_loop(road: Road, observer: Observer) -> str:
    job_id = endless(road, restart={"max_failures": 10, "backoff_s": 0})
    for attempt in (1, 2, 3):

        def is_running(job: dict[str, Any], attempt: int = attempt) -> bool:
            return bool(job["attempt"] == attempt and job["status"] == "running")

        road.wait(job_id, is_running)
        kill_role(observer, job_id, "w0")
    return job_id


def goes_on_without(role: str) -> Way:
    def way(road: Road, observer: Observer) -> str:
        two_ranks = {"parallel": {"tp": 2}} if role == "w1" else {}
        job_id = submit(road, {**short(road, 60), **two_ranks})
        road.step(job_id, 2)
        kill_role(observer, job_id, role)
        return job_id

    way.__name__ = f"goes_on_without_{role}"
    return way


def outlives(name: str) -> Way:
    def way(road: Road, observer: Observer) -> str:
        job_id = submit(road, short(road, 60))
        road.step(job_id, 2)
        before = session(road, name)
        kill_session(before)
        until(
            f"another {name}", lambda: session(road, name) != before and road.answers(), 60
        )
        return job_id

    way.__name__ = f"outlives_{name}"
    return way


def is_cancelled_when(kind: str) -> Way:
    def way(road: Road, observer: Observer) -> str:
        job_id = submit(road, short(road, 100_000))
        happened(road, job_id, kind)
        road.client.cancel(job_id)
        return job_id

    way.__name__ = f"is_cancelled_when_{kind}"
    return way


def is_cancelled_recovering(road: Road, observer: Observer) -> str:
    job_id = endless(road)
    kill_role(observer, job_id, "w0")
    road.client.cancel(job_id)
    return job_id


def loses_its_storage(road: Road, observer: Observer) -> str:
    """For a while: a job cannot end for good while the place of its journal is away."""
    job_id = endless(road)
    folder = Path(road.client.show(job_id)["storage_path"])
    away = folder.with_name(f"{folder.name}-away")
    folder.rename(away)
    folder.write_text("no folder")
    road.client.cancel(job_id)
    time.sleep(3)
    folder.unlink()
    away.rename(folder)
    return job_id


SOME: dict[Way, tuple[str, ...]] = {
    succeeds: ("succeeded",),
    is_mistaken: ("failed",),
    diverges: ("failed",),
    spends_its_budget: ("failed",),
    is_cancelled_when("job.running"): ("cancelled",),
}
ALL: dict[Way, tuple[str, ...]] = {
    **SOME,
    goes_on_without("driver"): ("succeeded",),
    crashes_in_a_loop: ("failed",),
    goes_on_without("w0"): ("succeeded",),
    goes_on_without("w1"): ("succeeded",),
    outlives("service"): ("succeeded",),
    outlives("agent"): ("succeeded",),
    is_cancelled_when("job.created"): ("cancelled",),
    is_cancelled_when("job.queued"): ("cancelled",),
    is_cancelled_when("job.scheduling"): ("cancelled",),
    is_cancelled_when("job.starting"): ("cancelled",),
    is_cancelled_recovering: ("cancelled",),
    loses_its_storage: ("cancelled", "failed"),
}


def end_in(road: Road, observer: Observer, way: Way, ends: tuple[str, ...]) -> str:
    """One job's life and end."""
    started = time.monotonic()
    job_id = way(road, observer)
    job = road.finish(job_id, 180)
    name = getattr(way, "__name__", "")
    sys.stdout.write(
        f"{name}: {job['status']} {job['status_reason'] or ''} after "
        f"{time.monotonic() - started:.1f} s\n"
    )
    assert job["status"] in ends, f"{name}\n{story(road, job_id)}"
    return job_id


def assert_clean(road: Road, observer: Observer, job_ids: list[str]) -> None:
    """No job is alive: nothing at all is held."""
    assert_nothing_left(road, observer, job_ids)

    def in_ray() -> dict[str, Any]:
        return {name: rows for name, rows in observer.look().items() if rows}

    deadline = time.monotonic() + 20
    while in_ray() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert in_ray() == {}
    assert open_rows(road) == []


def test_a_handful(road: Road, observer: Observer) -> None:
    assert_clean(
        road,
        observer,
        [end_in(road, observer, way, ends) for way, ends in SOME.items()],
    )


# ---- the long forms


@pytest.mark.chaos
def test_fifty_jobs_that_end_in_every_way(road: Road, observer: Observer) -> None:
    ways = list(ALL.items())
    assert_clean(
        road,
        observer,
        [end_in(road, observer, *ways[number % len(ways)]) for number in range(JOBS)],
    )


@dataclass(frozen=True)
class Size:
    """What a process holds."""

    fds: int
    """Without the database's files: the service keeps a connection for as many requests
    as there have been at once, up to a bound that
    tests/integration/test_service_leaks.py looks at."""
    memory_bytes: int

    @classmethod
    def of(cls, pid: int) -> "Size":
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return cls(open_files(pid)[1], pages * os.sysconf("SC_PAGE_SIZE"))


def run_short_jobs(road: Road, job_count: int, done: int) -> None:
    """So many more, two at a time."""
    alive: list[str] = []
    while done < job_count or alive:
        while len(alive) < 2 and done < job_count:
            alive.append(submit(road, short(road, 2, resources={"cpus_per_rank": 0.5})))
            done += 1
        job = road.wait(alive[0], lambda job: job["status"] in ENDS)
        assert job["status"] == "succeeded", job
        alive.remove(job["id"])


@pytest.mark.chaos
def test_nobody_grows_over_short_jobs(road: Road, observer: Observer) -> None:
    long_job = submit(
        road, short(road, 1_000_000, checkpoint={"every_steps": 1000, "keep_last": 1})
    )
    road.step(long_job, 2)
    pids = {"service": session(road, "service").sid, "agent": session(road, "agent").sid}
    pids["driver"] = int(
        until("a driver", lambda: observer.actors(long_job).get("driver"), 60)
    )
    looks: dict[int, dict[str, Size]] = {}
    for count in (2, FIRST_LOOK, SHORT_JOBS):
        run_short_jobs(road, count, max(looks, default=0))
        time.sleep(3)  # ended drivers are reaped, connections closed
        looks[count] = {name: Size.of(pid) for name, pid in pids.items()}
        line = ", ".join(
            f"{name} {size.fds} fds {size.memory_bytes / 2**20:.1f} MiB"
            for name, size in looks[count].items()
        )
        sys.stdout.write(f"after {count} short jobs: {line}\n")
    road.client.cancel(long_job)
    road.finish(long_job)
    for name, after in looks[SHORT_JOBS].items():
        before = looks[FIRST_LOOK][name]
        assert after.fds <= before.fds, f"{name}: {before.fds} -> {after.fds} fds"
        grown = after.memory_bytes - before.memory_bytes
        assert grown <= max(GROWTH_FLOOR_BYTES, MOST_GROWTH * before.memory_bytes), (
            f"{name}: grew by {grown / 2**20:.1f} MiB"
        )
    assert_clean(road, observer, [long_job])
