"""Jobs whose data-parallel size is changed while they run, and specs with `elastic`."""

from typing import Any

import httpx
import pytest

Json = dict[str, Any]
BATCH = 12


def elastic_spec(spec: Json, dp: int | str = 2, **elastic: int) -> Json:
    spec["parallel"] = {"tp": 2, "dp": dp}
    spec["training"] |= {"micro_batch_size": 1, "global_batch_size": BATCH}
    spec["resources"] = {"accelerator": "cpu", "cpus_per_rank": 1}
    if elastic:
        spec["elastic"] = elastic
    return spec


def resize(service: Any, job_id: str, dp: Any) -> httpx.Response:
    response: httpx.Response = service.user.post(
        f"/v1/jobs/{job_id}/resize", json={"dp": dp}
    )
    return response


def report(service: Any, cpus: int) -> None:
    service.agent.report({"node_id": "n1", "address": "10.0.0.1", "cpus": cpus})


def test_a_running_job_is_resized_by_its_driver(service: Any, spec: Json) -> None:
    job_id, driver = service.running_job(elastic_spec(spec, dp=2))
    report(service, 8)
    revision = driver.desired()["revision"]
    response = resize(service, job_id, 4)
    assert response.status_code == 202, response.text
    desired = driver.desired()
    assert desired["spec"]["parallel"]["dp"] == 4
    assert desired["desired"] == "run"
    assert desired["revision"] > revision
    message = service.events(job_id)[-1]["message"]
    assert message == "resize requested: from dp=2 to dp=4, 8 ranks"
    # Its own size again: nothing to do.
    revision = desired["revision"]
    assert resize(service, job_id, 4).status_code == 202
    assert driver.desired()["revision"] == revision


def test_other_jobs_see_what_a_resize_leaves(service: Any, spec: Json) -> None:
    job_id, _ = service.running_job(elastic_spec(spec, dp=2))
    report(service, 6)
    other = service.submit(elastic_spec(spec, dp=2))["id"]
    service.driver(other).send(("prepared", {"manifest": {}}))
    assert service.job(other)["desired_state"] == "prepare"
    # Not more than is left beside the job that waits.
    response = resize(service, job_id, 3)
    assert (response.status_code, response.json()["code"]) == (409, "no_room")
    assert response.json()["detail"] == (
        "dp=3 needs 6 ranks, and the cluster has room for 2 beside its other jobs; choose a "
        "smaller dp, or wait"
    )
    assert resize(service, job_id, 1).status_code == 202
    report(service, 6)
    assert service.job(other)["desired_state"] == "run"


@pytest.mark.parametrize(
    ("dp", "code", "words"),
    [
        (5, "batch_divides", "global_batch_size=12 is not a multiple"),
        (6, "elastic_bounds", "outside elastic.min_dp=1 to elastic.max_dp=4"),
    ],
)
def test_an_impossible_size_is_refused_with_the_possible_ones(
    service: Any, spec: Json, dp: int, code: str, words: str
) -> None:
    most = 4 if code == "elastic_bounds" else 6
    job_id, _ = service.running_job(elastic_spec(spec, dp=2, min_dp=1, max_dp=most))
    response = resize(service, job_id, dp)
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert (error["pointer"], error["code"]) == ("/dp", code)
    assert words in error["detail"]
    assert error["detail"].endswith("; possible: 1, 2, 3, 4" + ", 6" * (most == 6))


def test_what_cannot_be_resized_is_refused(service: Any, spec: Json) -> None:
    assert resize(service, "job-x", 2).status_code == 404
    early = service.submit(elastic_spec(spec, dp=2))["id"]
    response = resize(service, early, 1)
    assert (response.status_code, response.json()["code"]) == (409, "job_not_running")
    assert "waits for the first report of cluster 'default'" in response.json()["detail"]
    service.user.post(f"/v1/jobs/{early}/cancel")
    job_id, driver = service.running_job(elastic_spec(spec, dp=2))
    assert resize(service, job_id, 0).status_code == 422
    assert resize(service, job_id, "many").status_code == 422
    service.user.post(f"/v1/jobs/{job_id}/cancel")
    response = resize(service, job_id, 1)
    assert (response.status_code, response.json()["code"]) == (409, "job_not_running")
    driver.states("cancelled", attempt=1)
    response = resize(service, job_id, 1)
    assert (response.status_code, response.json()["code"]) == (409, "job_ended")


def test_a_shrunk_job_keeps_its_place_for_the_ranks_that_are_to_return(
    service: Any, spec: Json
) -> None:
    job_id, driver = service.running_job(elastic_spec(spec, dp=2, min_dp=1, max_dp=2))
    ranks = [{"rank": rank, "slot": rank, "node_id": "n1"} for rank in range(2)]
    driver.send(("attempt", {"state": "starting", "world_size": 2}), attempt=2)
    driver.send(("ranks", {"ranks": ranks}), attempt=2)
    report(service, 4)
    other = service.submit(elastic_spec(spec, dp=1))["id"]
    service.driver(other).send(("prepared", {"manifest": {}}))
    assert service.job(other)["desired_state"] == "prepare"
    assert service.job(job_id)["attempt"] == 2


def test_dp_auto_stays_within_the_bounds(service: Any, spec: Json) -> None:
    report(service, 64)
    job = service.submit(elastic_spec(spec, dp="auto", min_dp=1, max_dp=5))
    assert job["resolved_spec"]["parallel"]["dp"] == 4


@pytest.mark.parametrize(
    ("dp", "elastic", "pointer", "words"),
    [
        (6, {"min_dp": 1, "max_dp": 4}, "/parallel/dp", "set a dp between them, or auto"),
        ("auto", {"min_dp": 5, "max_dp": 5}, "/elastic", "no dp from 5 to 5 is possible"),
        (2, {"min_dp": 3, "max_dp": 1}, "/elastic", "exchange them"),
        (2, {"max_dp": 4}, "/elastic/min_dp", "required"),
    ],
)
def test_wrong_bounds_are_refused(
    service: Any, spec: Json, dp: Any, elastic: Json, pointer: str, words: str
) -> None:
    response = service.user.post("/v1/jobs", json=elastic_spec(spec, dp, **elastic))
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["pointer"] == pointer
    assert words in error["detail"]
