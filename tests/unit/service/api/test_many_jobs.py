"""Many jobs at once: lists that are chosen and counted, and one request that cancels."""

from typing import Any

import pytest


def submitted(service: Any, spec: dict[str, Any], count: int, **more: Any) -> list[str]:
    return [service.submit({**spec, "name": f"n{i}", **more})["id"] for i in range(count)]


def cancel(service: Any, expected: int = 202, /, **body: Any) -> dict[str, Any]:
    response = service.user.post("/v1/jobs:cancel", json=body)
    assert response.status_code == expected, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ids(references: list[dict[str, Any]]) -> list[str]:
    return [reference["id"] for reference in references]


def test_one_request_cancels_many_and_tells_what_became_of_each(
    service: Any, spec: dict[str, Any]
) -> None:
    first, second, third = submitted(service, spec, 3)
    service.user.post(f"/v1/jobs/{third}/cancel")
    answer = cancel(service, ids=[first, "job-none", third, second, first])
    assert ids(answer["cancelled"]) == [first, second]
    assert {job["status"] for job in answer["cancelled"]} == {"cancelled"}
    assert answer["ended"] == [{"id": third, "name": "n2", "status": "cancelled"}]
    assert answer["not_found"] == ["job-none"]
    assert answer["has_more"] is False
    assert service.job(first)["status"] == "cancelled"


def test_jobs_are_cancelled_by_state_name_and_label(
    service: Any, spec: dict[str, Any]
) -> None:
    swept = submitted(service, spec, 2, metadata={"sweep": "lr"})
    others = submitted(service, spec, 2)
    answer = cancel(service, metadata={"sweep": "lr"}, name="n1")
    assert ids(answer["cancelled"]) == [swept[1]]
    assert ids(cancel(service, metadata={"sweep": "lr"})["cancelled"]) == [swept[0]]
    assert ids(cancel(service, status=["queued", "running"])["cancelled"]) == []
    assert ids(cancel(service, name="n*")["cancelled"]) == others[::-1]


def test_a_running_job_writes_its_last_checkpoint_and_queued_ones_end(
    service: Any, spec: dict[str, Any]
) -> None:
    running, _ = service.running_job()
    waiting = service.submit(spec)["id"]
    answer = cancel(service, status=["running", "preparing"])
    states = {job["id"]: job["status"] for job in answer["cancelled"]}
    assert states == {running: "cancelling", waiting: "cancelled"}


def test_a_repeated_request_gets_the_first_answer(
    service: Any, spec: dict[str, Any]
) -> None:
    (job_id,) = submitted(service, spec, 1)
    options: dict[str, Any] = {
        "json": {"ids": [job_id]},
        "headers": {"Idempotency-Key": "k"},
    }
    first = service.user.post("/v1/jobs:cancel", **options)
    again = service.user.post("/v1/jobs:cancel", **options)
    assert again.json() == first.json()
    assert ids(again.json()["cancelled"]) == [job_id]
    assert again.headers["Idempotent-Replayed"] == "true"


@pytest.mark.parametrize(
    ("body", "pointer", "detail"),
    [
        ({}, "", "name the jobs by ids, or choose them by status, name or metadata"),
        ({"ids": ["job-a"], "name": "x"}, "", "name the jobs by ids, or choose"),
        ({"ids": []}, "/ids", "must have 1 or more items"),
        ({"ids": ["x"] * 1001}, "/ids", "must have 1000 or fewer items"),
        ({"status": ["sleepy"]}, "/status/0", "must be 'preparing'"),
        ({"metadata": {}}, "/metadata", "must have 1 or more items"),
        ({"name": "A%"}, "/name", "must match the pattern"),
        ({"ids": ["a"], "checkpoint": 0}, "/checkpoint", "must be true or false"),
        ({"all": True}, "/all", "unknown field"),
    ],
)
def test_unclear_requests_cancel_nothing(
    service: Any, body: dict[str, Any], pointer: str, detail: str
) -> None:
    answer = cancel(service, 422, **body)
    assert answer["errors"][0]["pointer"] == pointer
    assert detail in answer["errors"][0]["detail"]


def test_lists_are_chosen_repeated_filters_and_counted(
    service: Any, spec: dict[str, Any]
) -> None:
    job_ids = submitted(service, spec, 3, metadata={"team": "a", "odd.label": "x y"})
    service.user.post(f"/v1/jobs/{job_ids[0]}/cancel")

    def listed(query: str) -> tuple[list[str], int]:
        page = service.user.get(f"/v1/jobs?{query}").json()
        return ids(page["data"]), page["total"]

    assert listed("limit=1") == ([job_ids[2]], 3)
    assert listed("status=cancelled") == ([job_ids[0]], 1)
    assert listed("status=cancelled&status=preparing") == (job_ids[::-1], 3)
    assert listed("status=cancelled,preparing&limit=1") == ([job_ids[2]], 3)
    assert listed("name=n2") == ([job_ids[2]], 1)
    assert listed("name=*2&metadata[team]=a") == ([job_ids[2]], 1)
    assert listed("metadata[odd.label]=x+y&metadata[team]=b") == ([], 0)
    events = service.user.get(f"/v1/jobs/{job_ids[0]}/events?limit=1").json()
    assert (len(events["data"]), events["total"]) == (1, 3)


def test_thinned_metrics_count_what_they_were_thinned_from(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.steps(1, 9, mfu=0.0)
    page = service.user.get(f"/v1/jobs/{job_id}/metrics?max_points=3&keys=mfu").json()
    assert (len(page["data"]), page["total"], page["has_more"]) == (2, 9, False)
    # The peak of a CPU is not known, and neither is the share of it.
    assert page["data"][0] == {"step": 1, "attempt": 1, "mfu": None}
    assert service.job(job_id)["progress"]["mfu"] is None
