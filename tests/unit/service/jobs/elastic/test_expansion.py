"""Elastic jobs that grow into what a cluster has free, and return it to the queue."""

from collections.abc import Callable
from typing import Any

import pytest

from service.jobs.elastic import expansion
from service.jobs.elastic.expansion import larger_dp
from workers.decisions import elasticity
from workers.protocol.job import JobSpec

Json = dict[str, Any]
Start = Callable[..., tuple[str, Any]]


def elastic(spec: Json, dp: int = 1, most: int = 4, **fields: Any) -> Json:
    changed = {
        **spec,
        "parallel": {"tp": 2, "dp": dp},
        "training": {
            **spec["training"],
            "micro_batch_size": 1,
            "global_batch_size": 12,
            "steps": 10_000,
        },
        "resources": {"accelerator": "cpu", "cpus_per_rank": 1},
        **fields,
    }
    if most:
        changed["elastic"] = {"min_dp": 1, "max_dp": most}
    return changed


def report(service: Any, cpus: int) -> None:
    service.agent.report({"node_id": "n1", "address": "10.0.0.1", "cpus": cpus})


def dp_of(service: Any, job_id: str) -> int:
    dp: int = service.job(job_id)["resolved_spec"]["parallel"]["dp"]
    return dp


def assign(driver: Any, ranks: int, attempt: int = 1) -> None:
    """Has an attempt run on node n1, one second after its start, and do some steps."""
    places = [{"rank": rank, "slot": rank, "node_id": "n1"} for rank in range(ranks)]
    driver.send(
        ("attempt", {"state": "starting", "world_size": ranks}),
        ("attempt", {"state": "running", "world_size": ranks}),
        ("ranks", {"ranks": places}),
        attempt=attempt,
    )
    driver.steps(1, 3, attempt=attempt)


@pytest.fixture
def start_elastic(service: Any, spec: Json) -> Start:
    """Starts an elastic job of two ranks on a cluster of four CPUs."""

    def start(**fields: Any) -> tuple[str, Any]:
        job_id, driver = service.running_job(elastic(spec, **fields))
        assign(driver, 2 * dp_of(service, job_id))
        return job_id, driver

    return start


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets growth happen with the second report that has room for it."""
    monkeypatch.setattr(elasticity, "STEADY_S", 0.0)
    monkeypatch.setattr(expansion, "GROW_AGAIN_S", 0.0)


def wait_in_queue(service: Any, spec: Json) -> str:
    job_id: str = service.submit(spec)["id"]
    service.driver(job_id).send(("prepared", {"manifest": {}}))
    return job_id


@pytest.mark.usefixtures("at_once")
def test_a_job_grows_to_the_room_that_there_is_up_to_max_dp(
    service: Any, start_elastic: Start
) -> None:
    job_id, driver = start_elastic()
    report(service, 7)
    assert dp_of(service, job_id) == 1
    report(service, 7)
    assert dp_of(service, job_id) == 3
    assert driver.desired()["spec"]["parallel"]["dp"] == 3
    event = service.events(job_id)[-1]
    assert (event["type"], event["actor"]) == ("job.resizing", "system")
    assert event["message"] == (
        "growing, as the cluster has room (from dp=1 to dp=3: saves up to 3332 s of 4998 s, "
        "costs 1 s): from dp=1 to dp=3, 6 ranks"
    )
    assert event["data"] == {"dp": 3, "world_size": 6, "base_dp": 1}
    assign(driver, 6, attempt=2)
    for _ in range(2):
        report(service, 64)
    assert dp_of(service, job_id) == 4, "not above max_dp"


def test_room_must_last_before_a_job_grows(service: Any, start_elastic: Start) -> None:
    job_id, _ = start_elastic()
    for _ in range(3):
        report(service, 8)
    assert dp_of(service, job_id) == 1


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("cpus", "between", "fields"),
    [
        (2, 2, {}),
        (3, 3, {}),
        (8, 2, {}),
        (8, 8, {"most": 0}),
        (8, 8, {"most": 1}),
    ],
    ids=["no room", "half a replica", "room is gone again", "not elastic", "at max_dp"],
)
def test_a_job_keeps_its_size_without_room(
    service: Any, start_elastic: Start, cpus: int, between: int, fields: Json
) -> None:
    job_id, _ = start_elastic(**fields)
    report(service, cpus)
    report(service, between)
    report(service, cpus)
    assert dp_of(service, job_id) == 1


@pytest.mark.usefixtures("at_once")
def test_a_job_without_all_its_ranks_does_not_grow(
    service: Any, start_elastic: Start
) -> None:
    job_id, driver = start_elastic(dp=2)
    # One replica was lost with a node.
    assign(driver, 2, attempt=2)
    for _ in range(3):
        report(service, 64)
    assert dp_of(service, job_id) == 2


@pytest.mark.usefixtures("at_once")
def test_a_job_near_its_end_does_not_grow(service: Any, start_elastic: Start) -> None:
    job_id, driver = start_elastic()
    driver.steps(9_995, 9_999)
    for _ in range(3):
        report(service, 8)
    assert dp_of(service, job_id) == 1


@pytest.mark.usefixtures("at_once")
def test_a_new_attempt_is_not_judged_by_the_start_of_the_one_before(
    service: Any, start_elastic: Start
) -> None:
    job_id, driver = start_elastic()
    driver.send(("attempt", {"state": "starting", "world_size": 2}), attempt=2)
    places = [{"rank": rank, "slot": rank, "node_id": "n1"} for rank in range(2)]
    driver.send(("ranks", {"ranks": places}), attempt=2)
    for _ in range(3):
        report(service, 8)
    assert dp_of(service, job_id) == 1
    driver.send(("attempt", {"state": "running", "world_size": 2}), attempt=2)
    report(service, 8)
    assert dp_of(service, job_id) == 4


@pytest.mark.usefixtures("at_once")
def test_a_job_that_has_grown_returns_room_to_the_queue(
    service: Any, spec: Json, start_elastic: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, driver = start_elastic()
    for _ in range(2):
        report(service, 8)
    assign(driver, 8, attempt=2)
    other = wait_in_queue(service, elastic(spec, dp=2, most=0))
    report(service, 8)
    assert dp_of(service, job_id) == 1
    resize = service.events(job_id)[-1]
    assert resize["message"] == (
        f"returning room to {other}, which waits in the queue: from dp=4 to dp=1, 2 ranks"
    )
    monkeypatch.setattr(expansion, "GROW_AGAIN_S", 600.0)
    # The place is free only when the ranks have left it.
    assert service.job(other)["desired_state"] == "prepare"
    assign(driver, 2, attempt=3)
    for _ in range(3):
        report(service, 8)
    assert service.job(other)["desired_state"] == "run"
    assert dp_of(service, job_id) == 1, "no second change within ten minutes"


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(("cpus", "dp"), [(24, 1), (22, 4)])
def test_nothing_grows_while_a_job_waits_that_the_empty_cluster_could_hold(
    service: Any, spec: Json, start_elastic: Start, cpus: int, dp: int
) -> None:
    job_id, _ = start_elastic()
    report(service, 24)
    wait_in_queue(service, elastic(spec, dp=12, most=0))
    for _ in range(2):
        report(service, cpus)
    assert dp_of(service, job_id) == dp


@pytest.mark.usefixtures("at_once")
def test_a_size_that_a_user_chose_is_not_taken_back(
    service: Any, spec: Json, start_elastic: Start
) -> None:
    job_id, driver = start_elastic()
    report(service, 8)
    response = service.user.post(f"/v1/jobs/{job_id}/resize", json={"dp": 4})
    assert response.status_code == 202, response.text
    assign(driver, 8, attempt=2)
    wait_in_queue(service, elastic(spec, dp=2, most=0))
    report(service, 8)
    assert dp_of(service, job_id) == 4


@pytest.mark.usefixtures("at_once")
def test_only_as_many_jobs_return_room_as_is_needed(service: Any, spec: Json) -> None:
    jobs = {}
    for priority in (2, 1):
        fields = elastic(spec, most=2, priority=priority)
        job_id, driver = service.running_job(fields)
        assign(driver, 2)
        jobs[job_id] = driver
    for _ in range(4):
        report(service, 8)
    assert [dp_of(service, job_id) for job_id in jobs] == [2, 2]
    for driver in jobs.values():
        assign(driver, 4, attempt=2)
    wait_in_queue(service, elastic(spec, most=0))
    report(service, 8)
    assert [dp_of(service, job_id) for job_id in jobs] == [2, 1]


def test_the_largest_size_that_fits_is_chosen(spec: Json) -> None:
    asked = JobSpec.from_mapping(elastic(spec, dp=2, most=6))
    # dp=5 does not divide the batch of 12.
    sizes = [larger_dp(asked, free_ranks) for free_ranks in (0, 1, 2, 4, 6, 8, 99)]
    assert sizes == [None, None, 3, 4, 4, 6, 6]
