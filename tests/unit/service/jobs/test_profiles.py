"""Profiles of running jobs: requested, passed on to the driver, reported, listed."""

from typing import Any

import pytest

SPEC = {
    "model": {"preset": "gpt-tiny"},
    "data": {"train": [{"path": "builtin://python-stdlib"}]},
    "training": {"seq_length": 128, "global_batch_size": 8, "steps": 100},
    "optimizer": {"lr": 1e-3},
}
BODY = {"steps": "60-62", "ranks": [0]}
OPERATOR = {"name": "aten::mm", "calls": 9, "seconds": 0.25, "share": 0.5}


def path_of(job_id: str) -> str:
    return f"/v1/jobs/{job_id}/profiles"


def report(rank: int = 0, number: int = 1, **more: Any) -> tuple[str, dict[str, Any]]:
    """What a rank reports of a profile that it has written."""
    data: dict[str, Any] = {
        "rank": rank,
        "number": number,
        "first_step": 60,
        "last_step": 62,
        "folder": "/s/profiles/steps-00000060-00000062-a0001",
        "files": [f"rank-0000{rank}.trace.json.gz", f"rank-0000{rank}.memory.json"],
        "seconds": 0.5,
        "operators": [OPERATOR],
        "problem": None,
    }
    return "profile", {**data, **more}


def refused(rank: int, problem: str) -> tuple[str, dict[str, Any]]:
    return report(rank, folder="", files=[], operators=[], problem=problem)


def training(service: Any, num_ranks: int = 2) -> tuple[str, Any]:
    """A job whose ranks have done ten steps."""
    job_id, driver = service.running_job(SPEC)
    row = {"state": "running", "reason": None, "message": "", "world_size": num_ranks}
    driver.send(("attempt", row), attempt=1)
    driver.steps(1, 10)
    return job_id, driver


def only(service: Any, job_id: str) -> dict[str, Any]:
    (profile,) = service.user.get(path_of(job_id)).json()["data"]
    assert isinstance(profile, dict)
    return profile


def profiled(service: Any, job_id: str) -> list[dict[str, Any]]:
    return [row for row in service.events(job_id) if row["type"] == "job.profiled"]


def test_a_profile_is_requested_reported_by_its_ranks_and_listed(service: Any) -> None:
    job_id, driver = training(service)
    assert service.user.get(path_of(job_id)).json()["data"] == []
    answer = service.user.post(path_of(job_id), json={**BODY, "ranks": [1, 0, 1]})
    assert answer.status_code == 202, answer.text
    profile = answer.json()
    storage = service.user.get(f"/v1/jobs/{job_id}").json()["resolved_spec"]["storage"]
    assert profile["folder"] == (
        f"{storage['path']}/profiles/steps-00000060-00000062-a0001"
    )
    assert (profile["status"], profile["ranks"], profile["reports"]) == (
        "pending",
        [0, 1],
        [],
    )
    assert driver.desired()["profile"] == {
        "number": 1,
        "attempt": 1,
        "first_step": 60,
        "last_step": 62,
        "ranks": [0, 1],
    }
    driver.send(report(1), attempt=1)
    assert only(service, job_id)["status"] == "pending"
    driver.send(report(0, a_later_field=1), attempt=1)
    profile = only(service, job_id)
    assert (profile["id"], profile["status"]) == (f"{job_id}.profile-1-1", "written")
    assert [row["rank"] for row in profile["reports"]] == [0, 1]
    assert profile["reports"][0]["operators"] == [OPERATOR]
    requested, done = service.events(job_id)[-2:]
    assert (requested["type"], requested["message"]) == (
        "profile.requested",
        "profile of steps 60-62 requested of ranks 0, 1",
    )
    assert (done["type"], done["level"], done["ranks"], done["message"]) == (
        "job.profiled",
        "info",
        [0, 1],
        "profile of steps 60-62: 4 files",
    )
    assert done["data"]["folder"] == "/s/profiles/steps-00000060-00000062-a0001"
    assert len(done["data"]["files"]) == 4
    # A driver that has restarted reports it again.
    driver.send(report(0), attempt=1)
    assert len(profiled(service, job_id)) == 1


def test_one_profile_at_a_time_and_the_next_one_has_the_next_number(service: Any) -> None:
    job_id, driver = training(service)
    assert service.user.post(path_of(job_id), json=BODY).status_code == 202
    again = service.user.post(path_of(job_id), json={**BODY, "steps": "70"})
    assert (again.status_code, again.json()["code"]) == (409, "profile_running")
    assert "steps 60-62 is not written yet" in again.json()["detail"]
    driver.send(report(), attempt=1)
    following = service.user.post(path_of(job_id), json={**BODY, "steps": "70"})
    assert following.status_code == 202
    assert driver.desired()["profile"]["number"] == 2


def test_a_repeated_request_gets_the_first_answer(service: Any) -> None:
    job_id, _ = training(service)
    headers = {"Idempotency-Key": "k"}
    first = service.user.post(path_of(job_id), json=BODY, headers=headers)
    second = service.user.post(path_of(job_id), json=BODY, headers=headers)
    assert first.json() == second.json()
    assert second.headers["Idempotent-Replayed"] == "true"


WRONG: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "past": (
        {"steps": "10-12"},
        "/steps",
        "steps_past",
        "has done 10 steps; name later ones",
    ),
    "beyond": (
        {"steps": "90-110"},
        "/steps",
        "beyond_the_run",
        "the job's last step is 100",
    ),
    "no rank": ({"ranks": [0, 2]}, "/ranks", "no_rank", "has 2 ranks, 0 to 1"),
    "backwards": ({"steps": "70-60"}, "/steps", "step_range", "a first and a last step"),
    "too many": ({"steps": "20-40"}, "/steps", "step_range", "at most 20 steps"),
    "no number": ({"steps": "soon"}, "/steps", "string_pattern_mismatch", ""),
    "negative": ({"ranks": [-1]}, "/ranks/0", "greater_than_equal", ""),
    "unknown": ({"memory": True}, "/memory", "extra_forbidden", ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_steps_and_ranks_that_the_job_does_not_have_are_refused(
    service: Any, case: str
) -> None:
    changes, pointer, code, text = WRONG[case]
    job_id, driver = training(service)
    answer = service.user.post(path_of(job_id), json={**BODY, **changes})
    assert answer.status_code == 422, answer.text
    (error,) = answer.json()["errors"]
    assert (error["pointer"], error["code"]) == (pointer, code)
    assert text in error["detail"]
    assert driver.desired()["profile"] is None


def test_only_a_running_job_is_profiled(service: Any) -> None:
    waiting = service.submit()["id"]
    answer = service.user.post(path_of(waiting), json=BODY)
    assert (answer.status_code, answer.json()["code"]) == (409, "job_not_running")
    assert "training.profile" in answer.json()["detail"]
    job_id, driver = training(service)
    driver.states("succeeded", attempt=1)
    answer = service.user.post(path_of(job_id), json=BODY)
    assert (answer.status_code, answer.json()["code"]) == (409, "job_ended")
    assert service.user.post(path_of("job-none"), json=BODY).status_code == 404
    assert service.user.get(path_of("job-none")).status_code == 404


def test_ranks_that_have_written_nothing_have_a_reason(service: Any) -> None:
    job_id, driver = training(service)
    service.user.post(path_of(job_id), json={**BODY, "ranks": [0, 1]})
    problem = "its files cannot be written: cannot write /s/profiles: no space left"
    driver.send(report(0), refused(1, problem), attempt=1)
    profile = only(service, job_id)
    assert profile["status"] == "written"
    assert profile["reports"][1]["problem"] == problem
    (event,) = profiled(service, job_id)
    assert event["level"] == "warn"
    assert event["message"] == f"profile of steps 60-62: 2 files; rank 1: {problem}"


def test_a_profile_without_any_file_has_failed(service: Any) -> None:
    job_id, driver = training(service)
    service.user.post(path_of(job_id), json=BODY)
    driver.send(refused(0, "it came too late: step 61 begins"), attempt=1)
    assert only(service, job_id)["status"] == "failed"
    (event,) = profiled(service, job_id)
    assert event["message"] == (
        "no profile of steps 60-62: rank 0: it came too late: step 61 begins"
    )


def test_a_profile_ends_with_its_attempt(service: Any) -> None:
    job_id, driver = training(service)
    service.user.post(path_of(job_id), json=BODY)
    row = {"state": "starting", "reason": None, "message": "", "world_size": 2}
    driver.send(("attempt", row), attempt=2)
    profile = only(service, job_id)
    assert profile["status"] == "failed"
    (entry,) = profile["reports"]
    assert entry["problem"] == "attempt 1 has ended before it was written"
    driver.send(("attempt", {**row, "state": "running"}), attempt=2)
    # The steps that the attempt before had done are to come again.
    answer = service.user.post(path_of(job_id), json={**BODY, "steps": "8-9"})
    assert answer.status_code == 202, answer.text
    assert driver.desired()["profile"]["attempt"] == 2


def test_the_profile_of_a_spec_is_listed_too_and_files_outlive_the_list(
    service: Any,
) -> None:
    job_id, driver = training(service)
    driver.send(report(0, number=0, first_step=3, last_step=4), attempt=1)
    profile = only(service, job_id)
    assert (profile["number"], profile["status"], profile["ranks"]) == (0, "written", [0])
    for number in range(1, 60):
        driver.send(report(0, number=number), attempt=1)
    page = service.user.get(path_of(job_id)).json()
    assert page["total"] == 50
    assert page["data"][-1]["number"] == 59
    driver.states("succeeded", attempt=1)
    assert service.user.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert service.user.get(path_of(job_id)).status_code == 404
