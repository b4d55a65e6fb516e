"""200 jobs through one service process: nothing of them stays open, in the process or
in the database.
"""

import os
import random
import sqlite3
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import Client
from tests.support.service_process import (
    SPEC,
    Records,
    ServiceProcess,
    job_token,
    open_files,
    post,
    report_nodes,
    step_row,
)

pytestmark = pytest.mark.chaos
JOBS = 200
WARM = 50
STEPS = 20
ENDS = (
    "succeeded",
    "failed",
    "cancelled while running",
    "cancelled while starting",
    "cancelled while preparing",
    "deleted",
)
MOST_GROWTH_BYTES = 16 << 20
"""From job 50 to job 200 (measured: 4 MiB). Nothing of a job should stay; what grows is
malloc's arenas and SQLite's caches, 2 MiB for each connection that the pool adds. A
leak of a stream's or a request's objects would be some 100 KiB a job, 15 MiB and more.
"""
MOST_DATABASE_FILES = 20 * 2 + 1
"""The pool keeps up to 20 connections, as many as there ever were requests at once,
each with two files; one for all of them."""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path) as started:
        yield started


class Fleet:
    """Agent, drivers and users of many jobs, one after the other."""

    def __init__(
        self,
        service: ServiceProcess,
        user: httpx.Client,
        agent: httpx.Client,
        rng: random.Random,
    ) -> None:
        self.service = service
        self.user = user
        self.agent = agent
        self.rng = rng

    def live(self, end: str) -> None:
        """One job from its submission to its end, with two readers: one stays to the
        end, one leaves early.
        """
        job_id = str(post(self.user, "/v1/jobs", SPEC)["id"])
        readers = [
            threading.Thread(target=self.read, args=(job_id, most))
            for most in (None, self.rng.randint(1, 5))
        ]
        for reader in readers:
            reader.start()
        self.drive(job_id, end)
        for reader in readers:
            reader.join(60)
            assert not reader.is_alive(), f"a stream of {job_id} ({end}) does not end"
        if end == "deleted":
            assert self.user.delete(f"/v1/jobs/{job_id}").status_code == 204

    def read(self, job_id: str, most: int | None) -> None:
        with Client(self.service.url, self.service.user_token) as client:
            for count, _ in enumerate(client.stream(job_id)):
                if count == most:
                    return

    def drive(self, job_id: str, end: str) -> None:
        records = Records(job_id)
        path = f"/internal/v1/jobs/{job_id}/records"
        with self.service.client(job_token(self.agent, job_id)) as driver:

            def say(
                *facts: tuple[str, Any], source: str = "driver", attempt: int = 1
            ) -> None:
                post(driver, path, records.batch(source, attempt, *facts))

            if end == "cancelled while preparing":
                post(self.user, f"/v1/jobs/{job_id}/cancel", {})
                return
            say(
                ("prepared", {"manifest": {}}),
                ("state", {"state": "scheduling"}),
                attempt=0,
            )
            say(
                ("attempt", {"state": "starting", "world_size": 4}),
                ("state", {"state": "starting"}),
            )
            if end != "cancelled while starting":
                say(("attempt", {"state": "running"}), ("state", {"state": "running"}))
                say(*(step_row(step) for step in range(1, STEPS + 1)), source="a1/r0")
            if end.startswith("cancelled"):
                post(self.user, f"/v1/jobs/{job_id}/cancel", {})
            state = (
                "cancelled"
                if end.startswith("cancelled")
                else "failed"
                if end == "failed"
                else "succeeded"
            )
            attempts = (
                [("attempt", {"state": "failed" if end == "failed" else "stopped"})]
                if self.rng.random() < 0.5
                else []
            )
            say(*attempts, ("state", {"state": state}))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def test_nothing_of_two_hundred_jobs_stays_open(service: ServiceProcess) -> None:
    seed = int(
        os.environ.get("MEGATRON_RAY_SEED") or random.SystemRandom().randrange(1 << 31)
    )
    sys.stdout.write(f"leaks: MEGATRON_RAY_SEED={seed}\n")
    rng = random.Random(seed)
    measured = {}
    with (
        service.client(service.user_token) as user,
        service.client(service.agent_token) as agent,
    ):
        report_nodes(agent)
        fleet = Fleet(service, user, agent, rng)
        for number in range(1, JOBS + 1):
            fleet.live(ENDS[number % len(ENDS)])
            if number in (WARM, JOBS):
                measured[number] = open_files(service.pid), resident_bytes(service.pid)
        sys.stdout.write(f"open files and resident bytes after {measured}\n")
    ((_, files), memory) = measured[WARM]
    ((database_files, files_after), memory_after) = measured[JOBS]
    assert files_after <= files + 2, "two connections more or less are the moment's"
    assert database_files <= MOST_DATABASE_FILES
    assert memory_after - memory <= MOST_GROWTH_BYTES
    assert_database_closed(service.folder / "data" / "service.db")


def assert_database_closed(path: Path) -> None:
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:

        def rows(query: str) -> list[Any]:
            return database.execute(query).fetchall()

        ended = "('succeeded', 'failed', 'cancelled')"
        assert rows("SELECT count(*) FROM jobs") == [(JOBS,)]
        assert (
            rows(f"SELECT id FROM jobs WHERE status NOT IN {ended} OR ended_at IS NULL")
            == []
        )
        assert (
            rows(
                "SELECT job, attempt, state FROM attempts WHERE ended_at IS NULL OR state "
                "IN ('starting', 'running')"
            )
            == []
        )
        assert rows("SELECT * FROM idempotency") == [], "no request carried a key"
        deleted = "(SELECT number FROM jobs WHERE deleted_at IS NOT NULL)"
        for table in (
            "events",
            "metrics",
            "attempts",
            "checkpoints",
            "sources",
            "job_labels",
        ):
            assert rows(f"SELECT count(*) FROM {table} WHERE job IN {deleted}") == [(0,)]
            assert rows(
                f"SELECT count(*) FROM {table} WHERE job NOT IN (SELECT number FROM jobs)"
            ) == [(0,)]
    database.close()
