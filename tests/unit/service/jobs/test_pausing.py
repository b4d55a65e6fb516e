"""Jobs that are paused, and jobs that are resumed after a pause or after their end."""

import threading
from typing import Any

import httpx
import pytest

from service.local_stack.job_stops import StopJobs, StoppedJobs, resume_jobs, stop_jobs
from service.local_stack.record import StackRecord
from service.settings import Settings
from tests.support.service_tokens import USER_TOKEN
from tests.unit.service.conftest import Agent


def change(service: Any, job_id: str, verb: str, **body: Any) -> httpx.Response:
    response: httpx.Response = service.user.post(f"/v1/jobs/{job_id}/{verb}", json=body)
    return response


def changed(service: Any, job_id: str, verb: str, **body: Any) -> dict[str, Any]:
    response = change(service, job_id, verb, **body)
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    return job


def messages(service: Any, job_id: str) -> list[str]:
    return [event["message"] for event in service.events(job_id)]


def record_of(service: Any) -> StackRecord:
    return StackRecord(
        stack_id="s",
        boot_id="b",
        pid_namespace=1,
        up_pid=1,
        up_start_ticks=1,
        temp_dir="/tmp/mr-s",
        data_dir=str(service.settings.data_dir),
        url=service.url,
        token=USER_TOKEN,
    )


def test_a_running_job_is_paused_and_resumed_at_its_place(service: Any) -> None:
    job_id, driver = service.running_job()
    job = changed(service, job_id, "pause")
    assert (job["status"], job["pause_reason"]) == ("running", "user_paused")
    assert driver.desired()["desired"] == "pause"
    assert driver.desired()["final_checkpoint"] is True
    # Pausing again changes nothing.
    revision = driver.desired()["revision"]
    changed(service, job_id, "pause", reason="stack_stopped")
    assert driver.desired()["revision"] == revision

    driver.states("paused", attempt=1)
    job = service.job(job_id)
    assert (job["status"], job["status_reason"]) == ("paused", "user_paused")
    other = service.submit()["id"]
    other_driver = service.driver(other)
    other_driver.send(("prepared", {"manifest": {}}))
    assert service.job(other)["desired_state"] == "run", "its resources are free"

    job = changed(service, job_id, "resume")
    assert (job["status"], job["pause_reason"]) == ("queued", None)
    assert service.job(other)["status"] == "queued"
    other_driver.states("scheduling", "starting", "succeeded")
    assert driver.desired()["desired"] == "run"


def test_a_job_is_paused_in_every_state_before_it_runs(service: Any) -> None:
    job_id = service.submit()["id"]
    changed(service, job_id, "pause")
    assert service.job(job_id)["status"] == "preparing"
    service.agent.report({"node_id": "n1", "address": "10.0.0.1", "cpus": 4})
    driver = service.driver(job_id)
    driver.send(("prepared", {"manifest": {}}))
    # Queued, and not admitted: the driver releases nothing and reports the pause.
    assert service.job(job_id)["status"] == "queued"
    assert driver.desired()["desired"] == "pause"
    driver.states("paused")
    changed(service, job_id, "resume")
    assert driver.desired()["desired"] == "run"


def test_a_pause_is_taken_back_before_it_is_carried_out(service: Any) -> None:
    job_id, _ = service.running_job()
    changed(service, job_id, "pause")
    job = changed(service, job_id, "resume")
    assert (job["status"], job["desired_state"]) == ("running", "run")


@pytest.mark.parametrize("end", ["cancelled", "failed", "succeeded"])
def test_an_ended_job_is_resumed_with_a_new_budget(service: Any, end: str) -> None:
    job_id, driver = service.running_job()
    driver.send(("attempt", {"state": "failed"}), attempt=1)
    driver.states(end, attempt=1)
    assert service.job(job_id)["failures"] == 1
    changes = {
        "training": {"steps": 40},
        "checkpoint": {"resume_changes": ["training.steps"]},
    }
    job = changed(service, job_id, "resume", changes=changes)
    assert (job["status"], job["desired_state"]) == ("preparing", "prepare")
    assert (job["failures"], job["resumes"], job["problem"]) == (0, 1, None)
    assert job["ended_at"] is None
    assert job["progress"]["steps"] == 40
    assert job["spec"]["training"]["steps"] == 40
    assert messages(service, job_id)[-1].startswith("resumed after it had ")

    second = service.driver(job_id, epoch=2)
    desired = second.desired()
    assert (desired["resumes"], desired["spec"]["training"]["steps"]) == (1, 40)
    second.next_n = driver.next_n
    second.states("queued")
    assert second.desired()["desired"] == "run"
    second.states("scheduling", "starting", "running", "succeeded", attempt=2)
    assert service.job(job_id)["status"] == "succeeded"


def test_what_cannot_be_paused_or_resumed_is_refused(service: Any) -> None:
    job_id, driver = service.running_job()
    response = change(service, job_id, "resume")
    assert (response.status_code, response.json()["code"]) == (409, "job_active")
    assert "only a paused or ended job" in response.json()["detail"]
    response = change(service, job_id, "resume", changes={"name": "x"})
    assert "after the job's end" in response.json()["detail"]
    changed(service, job_id, "cancel")
    response = change(service, job_id, "pause")
    assert (response.status_code, response.json()["code"]) == (409, "job_not_running")
    driver.states("cancelled", attempt=1)
    response = change(service, job_id, "pause")
    assert (response.status_code, response.json()["code"]) == (409, "job_ended")
    assert change(service, "job-x", "resume").status_code == 404
    assert change(service, job_id, "pause", reason="tired").status_code == 422


def test_a_changed_spec_is_checked_before_the_job_is_resumed(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.steps(1, 20)
    driver.states("succeeded", attempt=1)
    for changes, pointer in [
        ({}, "/training/steps"),
        ({"training": {"steps": 20}}, "/training/steps"),
        ({"training": {"stepz": 40}}, "/training/stepz"),
        ({"training": {"steps": "many"}}, "/training/steps"),
        ({"training": 3}, "/training"),
        # The rate would decay over other steps, which nothing in the spec asks for.
        ({"training": {"steps": 40}}, "/training/steps"),
        ({"training": {"steps": 40, "seq_length": 8}}, "/training/seq_length"),
    ]:
        response = change(service, job_id, "resume", changes=changes)
        assert response.status_code == 422, changes
        assert response.json()["errors"][0]["pointer"] == pointer, response.text
    assert service.job(job_id)["status"] == "succeeded"


@pytest.mark.parametrize(
    ("length", "steps"), [({"tokens": 10**6}, 10**6), ({"epochs": 3}, 3 * 10**5)]
)
def test_a_job_is_resumed_for_another_length(
    service: Any, length: dict[str, Any], steps: int
) -> None:
    job_id, driver = service.running_job()
    manifest = {"train": [{"num_tokens": 10**5, "num_documents": 1}]}
    driver.send(("prepared", {"manifest": manifest, "steps": 20}))
    driver.states("succeeded", attempt=1)
    changes = {"training": length, "checkpoint": {"resume_changes": ["training.steps"]}}
    job = changed(service, job_id, "resume", changes=changes)
    training = job["resolved_spec"]["training"]
    batch = training["global_batch_size"] * training["seq_length"]
    assert training["steps"] == job["progress"]["steps"] > 20
    assert abs(training["steps"] - steps / batch) <= 1
    assert (training["epochs"], training["tokens"]) == (None, None)
    assert job["spec"]["training"].keys() & {"steps", "epochs", "tokens"} == set(length)


def test_a_folder_that_another_job_uses_by_now_is_refused(service: Any) -> None:
    spec = {**service.submit()["spec"], "storage": {"path": "/data/shared"}}
    job_id, driver = service.running_job(spec)
    driver.states("cancelled", attempt=1)
    service.submit(spec)
    response = change(service, job_id, "resume")
    assert response.status_code == 422
    assert response.json()["errors"][0]["code"] == "in_use"


def test_stopping_a_stack_pauses_its_jobs_and_the_next_start_resumes_them(
    service: Any,
) -> None:
    job_id, driver = service.running_job()
    queued = service.submit()["id"]
    waiting = service.driver(queued)
    waiting.send(("prepared", {"manifest": {}}))
    preparing = service.submit()["id"]
    reports: list[str] = []
    results: list[StoppedJobs] = []

    def stop() -> None:
        results.append(stop_jobs(record_of(service), reports.append, 20))

    thread = threading.Thread(target=stop)
    thread.start()
    while waiting.desired()["desired"] != "pause":
        pass
    waiting.states("paused")
    while driver.desired()["desired"] != "pause":
        pass
    driver.states("paused", attempt=1)
    thread.join(10)
    (result,) = results
    assert set(result.paused) == {job_id, queued}
    assert result.waiting == (preparing,)
    assert reports == [f"pausing {queued} (tiny)", f"pausing {job_id} (tiny)"], (
        "the queued one first, so that it is not admitted"
    )
    assert service.job(job_id)["status_reason"] == "stack_stopped"
    # What the user has paused stays paused.
    changed(service, queued, "resume")
    changed(service, queued, "pause")
    waiting.states("paused")
    reports.clear()
    resume_jobs(record_of(service), reports.append)
    assert reports == [f"resuming {job_id} (tiny)"]
    assert service.job(job_id)["desired_state"] == "run"
    assert service.job(queued)["status"] == "paused"


def test_jobs_that_do_not_stop_in_time_are_interrupted_and_resumed(service: Any) -> None:
    job_id, driver = service.running_job()
    result = stop_jobs(record_of(service), lambda text: None, 0.1)
    assert result == StoppedJobs(interrupted=(job_id,))
    resume_jobs(record_of(service), lambda text: None)
    assert driver.desired()["desired"] == "run"


def test_a_job_that_cannot_be_resumed_does_not_keep_others_from_it(service: Any) -> None:
    first, driver = service.running_job()
    changed(service, first, "pause", reason="stack_stopped")
    driver.states("paused", attempt=1)
    second = service.submit()["id"]
    changed(service, second, "pause", reason="stack_stopped")
    reports: list[str] = []

    def report(text: str) -> None:
        reports.append(text)
        # The user is quicker.
        if text.startswith(f"resuming {second}"):
            changed(service, second, "resume")

    resume_jobs(record_of(service), report)
    assert reports[1].startswith(f"{second} is not resumed: the job is preparing; only a")
    assert service.job(first)["desired_state"] == "run"


def test_jobs_are_cancelled_when_asked_for(service: Any) -> None:
    job_id = service.submit()["id"]
    result = stop_jobs(record_of(service), lambda text: None, 20, StopJobs.CANCEL)
    assert result == StoppedJobs(ended=(job_id,))
    assert service.job(job_id)["status"] == "cancelled"


def test_a_service_that_does_not_answer_does_not_keep_its_stack_alive(
    service: Any,
) -> None:
    record = record_of(service).model_copy(update={"token": "wrong"})
    reports: list[str] = []
    assert stop_jobs(record, reports.append, 20) == StoppedJobs()
    assert reports[0].startswith("could not pause jobs: ")
    resume_jobs(record, reports.append)
    assert reports[1].startswith("could not resume jobs: ")


def test_a_failed_job_is_resumed_without_a_step_and_warnings_are_noted(
    service: Any,
) -> None:
    job_id, driver = service.running_job()
    driver.states("failed", attempt=1)
    training = {"skip_steps": [4, 1000]}
    job = changed(service, job_id, "resume", changes={"training": training})
    assert job["resolved_spec"]["training"]["skip_steps"] == [4, 1000]
    (warning,) = service.user.get(f"/v1/jobs/{job_id}/events?type=spec.warning").json()[
        "data"
    ]
    assert "step 1000 is beyond training.steps=20" in warning["message"]


def test_a_resumed_job_keeps_its_place_and_takes_its_new_name(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.states("cancelled", attempt=1)
    service.agent.report({"node_id": "n1", "address": "10.0.0.1", "cpus": 4})
    for changes, pointer in [
        ({"storage": {"path": "/data/other"}}, "/storage/path"),
        ({"storage": None}, "/storage/path"),
        ({"cluster": "other"}, "/cluster"),
        ({"data": {"cache": "relative"}}, "/data/cache"),
        ({"data": {"train": [{"path": "s3://K:SECRET@b/x"}]}}, "/data/train"),
    ]:
        response = change(service, job_id, "resume", changes=changes)
        assert response.status_code == 422, changes
        assert response.json()["errors"][0]["pointer"].startswith(pointer), response.text
        assert "SECRET" not in response.text
    changes = {"name": "longer", "priority": 7, "metadata": {"team": "b"}}
    job = changed(service, job_id, "resume", changes=changes | {"parallel": {"dp": "auto"}})
    assert {key: job[key] for key in changes} == changes
    assert job["resolved_spec"]["parallel"]["dp"] == 4
    assert job["resolved_spec"]["storage"]["path"] == job["storage_path"]
    matching = service.user.get("/v1/jobs?name=longer&metadata[team]=b").json()["data"]
    assert [entry["id"] for entry in matching] == [job_id]


def test_the_length_of_other_data_is_not_that_of_the_old_ones(service: Any) -> None:
    job_id, driver = service.running_job()
    manifest = {"train": [{"num_tokens": 10**5, "num_documents": 1}]}
    driver.send(("prepared", {"manifest": manifest, "steps": 20}))
    driver.states("failed", attempt=1)
    named = {"resume_changes": ["training.epochs", "data"]}
    changes = {
        "training": {"epochs": 3},
        "data": {"train": [{"path": "/data/other.txt"}]},
        "checkpoint": named,
    }
    job = changed(service, job_id, "resume", changes=changes)
    training = job["resolved_spec"]["training"]
    assert (training["epochs"], training["steps"], job["progress"]["steps"]) == (
        3,
        None,
        None,
    )


def test_the_agent_looks_at_the_folder_of_a_job_before_it_is_resumed(
    settings: Settings, start: Any
) -> None:
    service = start(settings.model_copy(update={"check_wait_s": 10.0}))
    with service.agent as agent:
        agent.answer_checks()
        job_id, driver = service.running_job()
    driver.states("cancelled", attempt=1)
    problem = {"pointer": "/storage/path", "code": "lost", "detail": "nothing is there"}
    with Agent(service.agent.http) as agent:
        agent.answer_checks(problem)
        response = change(service, job_id, "resume")
    assert response.status_code == 422
    assert response.json()["errors"] == [problem]
    assert service.job(job_id)["status"] == "cancelled"


def test_a_folder_that_has_lost_its_files_fails_the_job(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.states("cancelled", attempt=1)
    changed(service, job_id, "resume")
    path = f"/internal/v1/jobs/{job_id}/cursor"
    # A driver whose records are all there, and one that finds none.
    assert driver.http.get(path, params={"epoch": 2, "last_n": 99}).status_code == 200
    response = driver.http.get(path, params={"epoch": 3, "last_n": 0})
    assert (response.status_code, response.json()["code"]) == (409, "fenced")
    job = service.job(job_id)
    assert (job["status"], job["status_reason"]) == ("failed", "storage_error")
    assert (
        "has lost files of this job: its newest record there is number 0" in job["message"]
    )
    assert job["problem"]["detail"] == job["message"]


def test_a_resume_that_is_sent_twice_is_answered_once(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.states("failed", attempt=1)
    key = {"Idempotency-Key": "again"}
    path = f"/v1/jobs/{job_id}/resume"
    first = service.user.post(path, json={}, headers=key)
    driver.states("queued", "scheduling", "starting", "succeeded", attempt=2)
    driver.steps(1, 20, attempt=2)
    again = service.user.post(path, json={}, headers=key)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert (again.status_code, again.json()) == (202, first.json())
    assert service.user.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert service.user.post(path, json={}, headers=key).status_code == 404
