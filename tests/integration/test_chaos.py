"""Ranks, nodes, driver, service and storage die at random moments, also two at once; every
job ends as if nothing had happened.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.chaos.schedule import FaultKind, Strike, make_schedule
from tests.support.chaos.striker import Nodes, Striker
from tests.support.fault_injection import (
    RankFile,
    assert_as_undisturbed,
    assert_nothing_left,
    dice,
    observed,
    open_rows,
    story,
)
from tests.support.faulty_storage.mounted import FaultyStorage, faulty_storage, why_not
from tests.support.running_stack import ENDS, Road, stack

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

NUM_JOBS = 5
PER_JOB = 6
NUM_DOUBLE = 7
NUM_NODES = 2
NODE_CPUS = 8
STEPS = 400
"""So many that no job ends before its last strike: most of them do not stop it, and a service
that is away may take half a minute to return."""
EVERY_STEPS = 25
JOB_S = 900.0
"""Enough for the slowest of its strikes on a busy machine."""


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FaultyStorage]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with faulty_storage(tmp_path) as mounted:
        yield mounted


def spec(road: Road, folder: Path) -> dict[str, Any]:
    """A job that only the joined nodes have room for."""
    return road.spec(
        storage={"path": str(folder)},
        training={"steps": STEPS, "global_batch_size": 4},
        checkpoint={"every_steps": EVERY_STEPS},
        resources={"cpus_per_rank": NODE_CPUS / 2, "placement_timeout_s": 3600},
        restart={"max_failures": 30, "backoff_s": 0.5},
    )


class Chaos:
    """Jobs in a row, each of which is struck several times."""

    def __init__(self, road: Road, storage: FaultyStorage, striker: Striker) -> None:
        self._road = road
        self._storage = storage
        self._striker = striker

    def undisturbed(self) -> list[dict[str, Any]]:
        job_id = self.submit("undisturbed")
        job = self._road.finish(job_id, JOB_S)
        assert job["status"] == "succeeded", story(self._road, job_id)
        return self._road.rows(job_id)

    def submit(self, name: str) -> str:
        folder = self._storage.path / name
        return str(self._road.client.submit(spec(self._road, folder))["id"])

    def run(self, name: str, strikes: list[Strike], rows: list[dict[str, Any]]) -> str:
        """Returns the id of a job that has survived its strikes."""
        job_id = self.submit(name)
        with RankFile(self._road, job_id) as file:
            for strike in strikes:
                file.reached(strike.step, JOB_S)
                time.sleep(strike.delay_s)
                began = time.monotonic()
                self._striker.strike(strike, job_id)
                taken_s = time.monotonic() - began
                sys.stdout.write(f"{strike} [{taken_s:.0f} s]\n")
                sys.stdout.flush()
            job = self._road.finish(job_id, JOB_S)
        assert job["status"] in ENDS
        assert_as_undisturbed(self._road, job, rows)
        sys.stdout.write(f"{name}: succeeded in attempt {job['attempt']}\n")
        return job_id


def test_jobs_survive_thirty_strikes(
    tmp_path: Path, storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine takes longer than the 30 s that Ray waits by default.
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")
    chance = dice("chaos")
    strikes = make_schedule(
        chance,
        tuple(FaultKind),
        num_jobs=NUM_JOBS,
        per_job=PER_JOB,
        num_double=NUM_DOUBLE,
        num_steps=STEPS,
    )
    sys.stdout.write("\n".join(map(str, strikes)) + "\n\n")
    with stack(tmp_path) as road, observed(road) as observer:
        nodes = Nodes(road, NUM_NODES, NODE_CPUS)
        try:
            nodes.refill()
            chaos = Chaos(road, storage, Striker(road, observer, storage, nodes))
            rows = chaos.undisturbed()
            job_ids = []
            for number in range(NUM_JOBS):
                of_job = [strike for strike in strikes if strike.job == number]
                job_ids.append(chaos.run(f"job-{number}", of_job, rows))
                storage.heal()
                assert_nothing_left(road, observer, job_ids, 90, nodes.sessions)
            assert open_rows(road) == []
        finally:
            nodes.close()
