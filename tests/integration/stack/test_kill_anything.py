"""Anything of a stack is killed while a job lives; the job goes on as if nothing had
happened.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_ray.checkpoint.directory import FOLDER, latest_committed
from tests.support.fault_injection import (
    Observer,
    RankFile,
    assert_as_undisturbed,
    assert_nothing_left,
    dice,
    history,
    kill,
    kill_session,
    observed,
    service_away,
    session,
    until,
    values,
)
from tests.support.running_stack import ENDS, Road, WholeJob

pytestmark = pytest.mark.ray

STEPS = 150
EVERY = 50
OFTEN = 10
COPY_EVERY = 5
"""Steps between copies of the ranks' states."""
MOMENT_STEPS = 120
MOMENT_EVERY = 40
"""Of the jobs that are hit at random moments."""
AWAY_S = 3.0
LONG_AWAY_S = 30.0
AWAY_STEPS = 50
LONG_AWAY_STEPS = 200
RUNS_AGAIN_S = 15.0
MOST_GAP = 3.0
"""Longest pause between two steps, in medians; a machine whose undisturbed steps pause
for longer is measured by that."""

PHASES = (
    "job.created",
    "job.scheduling",
    "job.starting",
    "ranks.assigned",
    "attempt.running",
    "checkpointing",
    "recovering",
)
VICTIMS = ("service", "driver", "agent", "rank", "ray")


@pytest.fixture(scope="module")
def observer(road: Road) -> Iterator[Observer]:
    with observed(road) as observing:
        yield observing


def often_saved(road: Road, **checkpoint: Any) -> dict[str, Any]:
    """The usual job, which is hit early in its short life."""
    return road.spec(checkpoint={"every_steps": OFTEN, **checkpoint})


def quick(road: Road, **groups: Any) -> dict[str, Any]:
    """A job of short steps."""
    groups["training"] = {
        "steps": STEPS,
        "global_batch_size": 4,
        **groups.get("training", {}),
    }
    groups["checkpoint"] = {"every_steps": EVERY, **groups.get("checkpoint", {})}
    return road.spec(**groups)


def short_lived(road: Road, **groups: Any) -> dict[str, Any]:
    """A job for random moments: a short life, any number of tries."""
    return quick(
        road,
        training={"steps": MOMENT_STEPS},
        checkpoint={"every_steps": MOMENT_EVERY},
        **groups,
    )


def steady(road: Road, steps: int) -> dict[str, Any]:
    """A job whose pauses are judged: its steps are long against the tenths of a second
    for which a busy machine holds a process up.
    """
    return quick(road, training={"steps": steps, "global_batch_size": 8})


Rows = list[dict[str, Any]]


def plain(road: Road, spec: dict[str, Any], timeout_s: float = 120) -> tuple[Rows, float]:
    """Loss and norm of every step when nothing disturbs it, and the longest pause in
    medians.
    """
    job_id = road.client.submit(spec)["id"]
    with RankFile(road, job_id) as file:
        job = road.finish(job_id, timeout_s)
    assert job["status"] == "succeeded", job
    rows = road.rows(job_id)
    assert [row["step"] for row in rows] == list(range(1, spec["training"]["steps"] + 1))
    median, longest, words = gaps(file)
    sys.stdout.write(f"undisturbed: {words}\n")
    return rows, longest / median


@pytest.fixture(scope="module")
def undisturbed(road: Road) -> Rows:
    return plain(road, quick(road))[0]


@pytest.fixture(scope="module")
def undisturbed_moments(road: Road) -> Rows:
    return plain(road, short_lived(road))[0]


def gaps(file: RankFile) -> tuple[float, float, str]:
    """(median, longest, both in words) time between two steps, by the rank's own clock."""
    pauses = sorted(
        (after["at"] - before["at"], after["step"])
        for before, after in pairwise(file.steps())
    )
    median = statistics.median(seconds for seconds, _ in pauses)
    longest = ", ".join(
        f"{seconds:.3f} before step {step}" for seconds, step in pauses[:-4:-1]
    )
    return (
        median,
        pauses[-1][0],
        f"median {median:.4f} s, longest {longest}: {pauses[-1][0] / median:.1f} medians",
    )


def assert_no_pause(
    away: Callable[[], tuple[RankFile, str]], undisturbed_pause: float
) -> None:
    """Judged last, so that everything else has been looked at.

    The machine may pause by itself, but hardly in two jobs that it disturbs.
    """
    accounts = []
    for _ in range(2):
        file, driver_died = away()
        median, longest, words = gaps(file)
        accounts.append(f"steps: {words}; the driver died {driver_died}")
        sys.stdout.write(f"{accounts[-1]}\n")
        if longest <= max(MOST_GAP, undisturbed_pause) * median:
            return
    raise AssertionError(" and again ".join(accounts))


def living(observer: Observer, job_id: str, role: str) -> int:
    """The pid of a role, once there is one."""
    return int(until(f"a living {role}", lambda: observer.actors(job_id).get(role), 60))


def stay_away(
    road: Road, observer: Observer, job_id: str, file: RankFile, seconds: float, steps: int
) -> str:
    """Keeps the service away so long, and for so many steps, a checkpoint and a SIGKILL
    of the driver; returns at what step that was.
    """
    driver = living(observer, job_id, "driver")
    with service_away(road):
        gone_at = time.monotonic()
        before = file.steps()[-1]["step"]
        file.reached(before + 20)
        kill(driver)
        driver_died = f"at step {file.steps()[-1]['step']}"
        file.reached(before + steps)
        assert any(
            line["kind"] == "checkpoint_written" and line["data"]["step"] > before
            for line in file.lines()
        )
        time.sleep(max(0.0, seconds - (time.monotonic() - gone_at)))
    return driver_died


def away_once(
    road: Road,
    observer: Observer,
    spec: dict[str, Any],
    undisturbed: Rows,
    seconds: float,
    steps: int,
) -> tuple[RankFile, str]:
    """One job without its service for so long, looked at in every way but its pauses;
    its file, and when the driver died.
    """
    job_id = road.client.submit(spec)["id"]
    with RankFile(road, job_id) as file:
        file.reached(10)
        road.step(job_id, 1)
        pids = road.pids(job_id)
        driver_died = stay_away(road, observer, job_id, file, seconds, steps)
        job = road.finish(job_id, 600)
    assert_as_undisturbed(road, job, undisturbed)
    assert job["attempt"] == 1
    assert road.pids(job_id) == pids
    assert values(file.steps()) == values(road.rows(job_id))
    assert_nothing_left(road, observer, [job_id])
    return file, driver_died


def test_agent_driver_rank_and_service_die_at_once(
    road: Road, observer: Observer, whole_job: WholeJob
) -> None:
    job_id = road.client.submit(often_saved(road))["id"]
    folder = road.client.show(job_id)["storage_path"]
    with RankFile(road, job_id) as file:
        file.reached(5)
        agent = session(road, "agent")
        driver = living(observer, job_id, "driver")
        rank = living(observer, job_id, "w0")
        file.reached(OFTEN)
        until("a commit", lambda: latest_committed(folder), 30)
        # The rank serves the store. Without a driver none notices its death.
        kill_session(agent)
        kill(driver)
        kill(rank)
        with service_away(road):
            time.sleep(AWAY_S)
            newest = latest_committed(folder)
        job = road.finish(job_id)
        assert newest is not None
        assert file.steps(2)[0]["step"] == newest.step + 1
    assert session(road, "agent") != agent
    assert job["attempt"] == 2
    assert job["failures"] == 1
    assert_as_undisturbed(road, job, whole_job.rows)
    assert_nothing_left(road, observer, [job_id])


def test_copies_in_memory_replace_checkpoints_that_cannot_be_read(
    road: Road, observer: Observer, whole_job: WholeJob
) -> None:
    """Rank 0 dies, whose reports only its own node has."""
    spec = often_saved(road, peer_every_steps=COPY_EVERY)
    job_id = road.client.submit(spec)["id"]
    folder = Path(road.client.show(job_id)["storage_path"], FOLDER)
    hidden = folder.with_name("hidden")
    with RankFile(road, job_id) as file:
        file.reached(OFTEN + COPY_EVERY)
        until("a commit", lambda: latest_committed(str(folder.parent)), 30)
        rank = living(observer, job_id, "w0")
        folder.rename(hidden)
        kill(rank)
        file.reached(1, attempt=2)
        hidden.rename(folder)
        job = road.finish(job_id)
    first = file.steps(2)[0]["step"]
    assert file.steps(1)[-1]["step"] - (first - 1) <= COPY_EVERY
    starts = [e for e in history(road, job_id) if e["type"] == "attempt.started"]
    assert [start["message"] for start in starts] == [
        "from step 0",
        f"from peer copies of step {first - 1}",
    ]
    assert job["attempt"] == 2
    assert_as_undisturbed(road, job, whole_job.rows)
    assert_nothing_left(road, observer, [job_id])


def kill_agent(road: Road) -> None:
    """Kills the agent and waits for the one that replaces it."""
    agent = session(road, "agent")
    kill_session(agent)
    until("another agent", lambda: session(road, "agent") != agent, 30)


# ---- the long forms


@pytest.mark.chaos
def test_the_service_is_away_and_the_driver_dies(
    road: Road, observer: Observer, undisturbed: Rows
) -> None:
    away_once(road, observer, quick(road), undisturbed, AWAY_S, AWAY_STEPS)


@pytest.mark.chaos
def test_the_agent_dies_and_then_the_rank_that_serves_the_store(
    road: Road, observer: Observer, undisturbed: Rows
) -> None:
    job_id = road.client.submit(quick(road))["id"]
    with RankFile(road, job_id) as file:
        file.reached(10)
        before = living(observer, job_id, "w0"), living(observer, job_id, "w1")
        kill_agent(road)
        file.reached(EVERY + 20)
        after = observer.actors(job_id)
        assert (after["w0"], after["w1"]) == before
        assert {row["attempt"] for row in file.steps()} == {1}
        kill(before[0])
        job = road.finish(job_id)
    assert job["attempt"] == 2
    assert job["failures"] == 1
    assert_as_undisturbed(road, job, undisturbed)
    assert_nothing_left(road, observer, [job_id])


@pytest.mark.chaos
def test_a_rank_dies_while_the_service_is_away(
    road: Road, observer: Observer, undisturbed: Rows
) -> None:
    job_id = road.client.submit(quick(road))["id"]
    with RankFile(road, job_id) as file:
        file.reached(EVERY + 10)
        folder = road.client.show(job_id)["storage_path"]
        until("a commit", lambda: latest_committed(folder), 30)
        rank = living(observer, job_id, "w1")
        with service_away(road):
            newest = latest_committed(folder)
            assert newest is not None
            killed_at = time.time()
            kill(rank)
            file.reached(newest.step + 1, RUNS_AGAIN_S, attempt=2)
            first = file.steps(2)[0]
            sys.stdout.write(
                f"running again after {first['at'] - killed_at:.2f} s from step {newest.step}\n"
            )
        job = road.finish(job_id)
    assert first["step"] == newest.step + 1
    assert first["at"] - killed_at <= RUNS_AGAIN_S
    assert job["attempt"] == 2
    assert job["failures"] == 1
    assert_as_undisturbed(road, job, undisturbed)
    assert_nothing_left(road, observer, [job_id])


@pytest.mark.chaos
@pytest.mark.parametrize(("seconds", "steps"), [(10.0, 240), (LONG_AWAY_S, 600)])
def test_nobody_pauses_while_the_service_is_away(
    road: Road, observer: Observer, seconds: float, steps: int
) -> None:
    spec = steady(road, steps)
    undisturbed, pause = plain(road, spec, 600)

    def away() -> tuple[RankFile, str]:
        return away_once(road, observer, spec, undisturbed, seconds, LONG_AWAY_STEPS)

    assert_no_pause(away, pause)


@pytest.mark.chaos
def test_rays_head_dies(road: Road, observer: Observer, undisturbed: Rows) -> None:
    job_id = road.client.submit(quick(road))["id"]
    with RankFile(road, job_id) as file:
        file.reached(EVERY + 10)
        folder = road.client.show(job_id)["storage_path"]
        newest = until("a commit", lambda: latest_committed(folder), 30)
        kill_session(session(road, "ray"))
        job = road.finish(job_id, 300)
        assert file.steps(job["attempt"])[0]["step"] > newest.step
    assert_as_undisturbed(road, job, undisturbed)
    assert_nothing_left(road, observer, [job_id])


def strike(
    road: Road, observer: Observer, job_id: str, victim: str, chance: random.Random
) -> str:
    """Kills one thing; returns what was hit."""
    if victim == "service":
        seconds = chance.uniform(0.5, 10.0)
        with service_away(road):
            time.sleep(seconds)
        return f"service away for {seconds:.1f} s"
    if victim in ("ray", "agent"):
        kill_session(session(road, "ray" if victim == "ray" else "agent"))
        return victim
    role = f"w{chance.randrange(2)}" if victim == "rank" else victim
    pid = observer.actors(job_id).get(role)
    if pid is None:
        return f"{role} was not there"
    kill(pid)
    return role


def reach(road: Road, job_id: str, file: RankFile, phase: str) -> None:
    """Waits for a phase of the job's life."""
    if phase == "checkpointing":
        file.reached(MOMENT_EVERY)
    elif phase == "recovering":
        file.reached(MOMENT_EVERY + 1)
        kill(road.pids(job_id)[0])
    else:
        until(
            phase,
            lambda: any(event["type"] == phase for event in history(road, job_id)),
            120,
        )


@pytest.mark.chaos
@pytest.mark.parametrize("number", range(20))
def test_anything_at_any_moment(
    road: Road, observer: Observer, undisturbed_moments: Rows, number: int
) -> None:
    chance = dice(f"moment {number}")
    phase = PHASES[number % len(PHASES)]
    delay_s = chance.uniform(0.0, 1.5)
    victims = chance.sample(VICTIMS, chance.choice((1, 2)))
    job_id = road.client.submit(
        short_lived(road, restart={"max_failures": 20, "backoff_s": 0.2})
    )["id"]
    with RankFile(road, job_id) as file:
        reach(road, job_id, file, phase)
        time.sleep(delay_s)
        for victim in victims:
            hit = strike(road, observer, job_id, victim, chance)
            sys.stdout.write(f"{delay_s:.2f} s after {phase}: {hit}\n")
            time.sleep(chance.uniform(0.0, 2.0))
        job = road.finish(job_id, 300)
    assert job["status"] in ENDS
    assert_as_undisturbed(road, job, undisturbed_moments)
    assert_nothing_left(road, observer, [job_id], 40)
