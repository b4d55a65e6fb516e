"""A job from submission to its end, over HTTP, with an agent and a driver that only
speak the internal API.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def test_whole_life(
    service: Any, spec: dict[str, Any], make_node: Callable[..., Any]
) -> None:
    service.agent.report(make_node(cpus=4))
    job = service.submit(spec | {"metadata": {"team": "a"}, "priority": 3})
    job_id = job["id"]
    assert (job["object"], job["status"], job["desired_state"], job["status_reason"]) == (
        "job",
        "preparing",
        "prepare",
        "preparing_data",
    )
    assert job["spec"]["training"] == spec["training"]
    assert job["metadata"] == {"team": "a"}
    assert job["priority"] == 3
    assert job["resolved_spec"]["parallel"]["dp"] == 4
    assert job["resolved_spec"]["resources"]["accelerator"] == "cpu"
    assert (
        job["storage_path"]
        == job["resolved_spec"]["storage"]["path"]
        == str(service.settings.data_dir / "jobs" / job_id)
    )

    driver = service.driver(job_id)
    assert driver.desired()["desired"] == "prepare"
    reply = driver.send(
        ("prepared", {"manifest": {"unigram_nats": 6.2}, "num_train_tokens": 10})
    )
    assert reply["stored"] == 1
    assert reply["desired"]["desired"] == "run"
    assert service.job(job_id)["status"] == "queued"
    assert service.job(job_id)["desired_state"] == "run"

    driver.states("scheduling")
    driver.send(
        ("attempt", {"state": "starting", "world_size": 4}),
        ("ranks", {"ranks": ranks(4)}),
        attempt=1,
    )
    driver.states("starting", "running", attempt=1)
    driver.send(("attempt", {"state": "running", "world_size": 4}), attempt=1)
    driver.steps(1, 10)
    job = service.job(job_id)
    assert job["status"] == "running"
    assert job["started_at"]
    assert job["attempt"] == 1
    assert job["progress"] == {
        "step": 10,
        "steps": 20,
        "loss": pytest.approx(8.9),
        "tokens_per_s": 2048.0,
        "eta_s": pytest.approx(5.0),
        "mfu": 0.1,
        "val_loss": None,
        "source_val_losses": {},
        "unigram_nats": 6.2,
    }
    path = job["storage_path"] + "/checkpoints/step-00000020-a0001"
    driver.steps(11, 20)
    driver.send(
        ("eval", {"step": 20, "split": "validation", "loss": 3.5, "num_tokens": 99}),
        source="a1/r0",
        attempt=1,
    )
    driver.send(
        (
            "checkpoint",
            {"action": "committed", "step": 20, "path": path, "bytes": 77, "loss": 8.8},
        ),
        attempt=1,
    )
    driver.send(
        ("attempt", {"state": "succeeded"}),
        ("state", {"state": "succeeded", "message": "20 steps"}),
        attempt=1,
    )

    job = service.job(job_id)
    assert job["status"] == "succeeded"
    assert job["ended_at"]
    assert job["message"] == "20 steps"
    assert job["problem"] is None
    assert job["progress"]["val_loss"] == 3.5
    assert job["progress"]["eta_s"] is None
    assert job["last_checkpoint"]["step"] == 20
    assert job["last_checkpoint"]["path"] == path
    events = service.events(job_id)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert types(events) == [
        *(
            "job.created",
            "job.prepared",
            "job.queued",
            "job.admitted",
            "job.scheduling",
            "attempt.started",
            "ranks.assigned",
        ),
        *(
            "job.starting",
            "job.running",
            "attempt.running",
            "eval.completed",
            "checkpoint.committed",
            "attempt.ended",
            "job.succeeded",
        ),
    ]
    assert events[0]["actor"] == "user"
    assert events[0]["id"] == f"{job_id}.1"
    assert events[0]["object"] == "job.event"
    check_history(service, job_id, path)


def ranks(world: int) -> list[dict[str, Any]]:
    return [
        {
            "slot": rank,
            "rank": rank,
            "node_id": "n1",
            "address": "10.0.0.1",
            "gpu": None,
            "pid": 100 + rank,
            "coordinates": {"dp": rank},
        }
        for rank in range(world)
    ]


def check_history(service: Any, job_id: str, path: str) -> None:
    get = service.user.get
    assert get(f"/v1/jobs/{job_id}/ranks").json()["data"] == ranks(4)
    attempt = get(f"/v1/jobs/{job_id}/attempts").json()["data"][0]
    assert (attempt["attempt"], attempt["state"], attempt["world_size"]) == (
        1,
        "succeeded",
        4,
    )
    assert attempt["ended_at"]
    checkpoints = get(f"/v1/jobs/{job_id}/checkpoints").json()["data"]
    assert [(item["step"], item["path"], item["bytes"]) for item in checkpoints] == [
        (20, path, 77)
    ]
    rows = get(f"/v1/jobs/{job_id}/metrics", params={"keys": "loss,split_s"}).json()
    assert [row["step"] for row in rows["data"]] == list(range(1, 21))
    assert not rows["has_more"]
    assert rows["data"][0] == {
        "step": 1,
        "attempt": 1,
        "loss": pytest.approx(8.99),
        "split_s": {"data": 0.01},
    }


def test_time_left_counts_the_samples_of_a_ramp_up(
    service: Any, spec: dict[str, Any]
) -> None:
    rampup = {"start": 4, "increment": 4, "samples": 40}
    training = {**spec["training"], "global_batch_size": 8, "rampup_batch_size": rampup}
    job_id, driver = service.running_job(spec | {"training": training})
    driver.steps(1, 5)
    # 0.5 s for 4 samples; then 5 steps of 4 and 10 of 8.
    assert service.job(job_id)["progress"]["eta_s"] == pytest.approx(0.5 * 25)


def test_job_before_any_agent_waits_and_is_resolved_by_the_first_report(
    service: Any, make_node: Callable[..., Any]
) -> None:
    job = service.submit()
    assert (job["status"], job["status_reason"]) == (
        "preparing",
        "waiting_agent",
    )
    assert "agent" in job["message"]
    assert service.agent.desired().jobs == (), "an unresolved spec is not offered"
    service.agent.report(make_node(cpus=2))
    job = service.job(job["id"])
    assert job["status_reason"] == "preparing_data"
    assert job["resolved_spec"]["parallel"]["dp"] == 2
    assert [offered.job_id for offered in service.agent.desired().jobs] == [job["id"]]


def test_job_before_any_agent_that_the_cluster_cannot_hold_fails_with_its_field(
    service: Any, spec: dict[str, Any], make_node: Callable[..., Any]
) -> None:
    job = service.submit(spec | {"parallel": {"tp": 4}})
    service.agent.report(make_node("n1", cpus=2), make_node("n2", cpus=2))
    job = service.job(job["id"])
    assert (job["status"], job["status_reason"]) == ("failed", "spec_invalid")
    assert job["problem"]["errors"][0]["pointer"] == "/parallel/tp"
    assert "tp=4 needs 4 CPUs on one node" in job["problem"]["detail"]


def test_gpus_are_taken_where_there_are_any(
    service: Any, make_node: Callable[..., Any]
) -> None:
    service.agent.report(make_node("n1", cpus=64, gpus=2), make_node("n2", cpus=64))
    job = service.submit()
    assert job["resolved_spec"]["resources"]["accelerator"] == "gpu"
    assert job["resolved_spec"]["parallel"]["dp"] == 2


def test_notes_on_the_data_are_events(service: Any, make_node: Callable[..., Any]) -> None:
    service.agent.report(make_node(cpus=4))
    job_id = service.submit()["id"]
    notes = ["set: 2 files (a.md, b.md) of other types: not read", *map(str, range(60))]
    service.driver(job_id).send(("prepared", {"manifest": {"notes": notes}}))
    messages = []
    for event in service.events(job_id):
        if event["type"] == "data.note":
            messages.append(event["message"])
    assert messages == [*notes[:50], "and 11 more notes on the data"]


def test_the_first_document_as_it_was_tokenized_is_an_event(
    service: Any, make_node: Callable[..., Any]
) -> None:
    service.agent.report(make_node(cpus=4))
    job_id = service.submit()["id"]
    shown = "first document of set: 257 '<s>', 97 'a'"
    service.driver(job_id).send(("prepared", {"manifest": {"first_document": shown}}))
    (event,) = [
        event for event in service.events(job_id) if event["type"] == "data.first_document"
    ]
    assert event["message"] == shown


def test_second_job_waits_for_room_and_is_admitted_when_the_first_ends(
    service: Any, make_node: Callable[..., Any]
) -> None:
    first, driver = service.running_job()
    second = service.submit()["id"]
    other = service.driver(second)
    assert other.send(("prepared", {"manifest": {}}))["desired"]["desired"] == "prepare"
    job = service.job(second)
    assert (job["status"], job["status_reason"]) == (
        "queued",
        "waiting_quota",
    )
    assert job["message"] == "needs 4 CPU ranks; room for 0 now"
    driver.states("succeeded", attempt=1)
    assert other.desired()["desired"] == "run"
    assert service.job(second)["desired_state"] == "run"
    assert first in service.agent.desired().terminal


def test_job_back_in_the_queue_is_admitted_again_at_its_old_place(
    service: Any, make_node: Callable[..., Any]
) -> None:
    service.agent.report(make_node(cpus=4))
    job_id = service.submit()["id"]
    driver = service.driver(job_id)
    driver.send(("prepared", {"manifest": {}}))
    revision = driver.desired()["revision"]
    driver.states("scheduling")
    reply = driver.states("queued", reason="waiting_gang", message="no room in 300 s")
    assert reply["desired"]["desired"] == "run"
    assert reply["desired"]["revision"] > revision
    assert service.job(job_id)["failures"] == 0


def test_cancel_before_a_driver_is_immediate(service: Any) -> None:
    job_id = service.submit()["id"]
    response = service.user.post(f"/v1/jobs/{job_id}/cancel")
    assert response.status_code == 202
    assert response.json()["status"] == "cancelled"
    assert response.json()["ended_at"]
    assert service.user.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    assert types(service.events(job_id)) == [
        "job.created",
        "job.cancelling",
        "job.cancelled",
    ]


def test_cancel_of_a_running_job_reaches_driver_and_agent_at_once(service: Any) -> None:
    job_id, driver = service.running_job()
    revision = driver.desired()["revision"]
    cluster_revision = service.agent.desired().revision
    replies: list[Any] = []
    waits = [
        threading.Thread(
            target=lambda: replies.append(driver.desired(revision, 20)["desired"])
        ),
        threading.Thread(
            target=lambda: replies.append(
                service.agent.desired(cluster_revision, 20).jobs[0].desired
            )
        ),
    ]
    for wait in waits:
        wait.start()
    time.sleep(0.2)
    began = time.monotonic()
    response = service.user.post(f"/v1/jobs/{job_id}/cancel", json={"checkpoint": False})
    assert response.json()["status"] == "cancelling"
    assert response.json()["desired_state"] == "cancel"
    for wait in waits:
        wait.join(10)
    assert replies == ["cancel", "cancel"]
    assert time.monotonic() - began < 2
    assert driver.desired()["final_checkpoint"] is False
    driver.states("running", attempt=1)  # sent before it knew of the cancel
    assert service.job(job_id)["status"] == "cancelling"
    driver.states("cancelled", reason="user_cancelled", attempt=1)
    assert service.job(job_id)["status"] == "cancelled"
    assert "job.state_ignored" in types(service.events(job_id))


def test_terminal_states_never_change(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.states("failed", reason="oom", message="rank 3 is out of memory", attempt=1)
    before = service.job(job_id)
    assert before["problem"]["detail"] == "rank 3 is out of memory"
    assert before["problem"]["reason"] == "oom"
    driver.states("running", "succeeded", "failed", attempt=1)
    driver.send(("problem", {"problems": [{"pointer": "/x", "code": "c", "detail": "d"}]}))
    service.user.post(f"/v1/jobs/{job_id}/cancel")
    after = service.job(job_id)
    assert after == before


def test_problem_found_while_preparing_fails_the_job_with_its_field(
    service: Any, make_node: Callable[..., Any]
) -> None:
    service.agent.report(make_node())
    job_id = service.submit()["id"]
    problem = {
        "pointer": "/data/train/0/path",
        "code": "too_short",
        "detail": "12 tokens are not enough; add text",
    }
    service.driver(job_id).send(("problem", {"problems": [problem]}))
    job = service.job(job_id)
    assert (job["status"], job["status_reason"]) == ("failed", "spec_invalid")
    assert job["problem"]["errors"] == [problem]
    assert job["problem"]["code"] == "spec_invalid"


def test_failures_and_preemptions_are_counted_apart(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.states("recovering", reason="worker_died", attempt=1)
    driver.send(
        ("attempt", {"state": "failed", "reason": "worker_died"}),
        ("attempt", {"state": "failed", "reason": "worker_died"}),
        attempt=1,
    )
    driver.send(("attempt", {"state": "failed", "reason": "preempted"}), attempt=2)
    job = service.job(job_id)
    assert (job["failures"], job["preemptions"], job["attempt"], job["status"]) == (
        1,
        1,
        2,
        "recovering",
    )


def test_a_history_can_be_read_from_its_end_and_by_level(service: Any) -> None:
    job_id, driver = service.running_job()
    for number in range(5):
        driver.send(
            (
                "event",
                {
                    "type": "placement.waiting",
                    "level": ("info", "warn", "error")[number % 3],
                    "message": str(number),
                },
            ),
            attempt=1,
        )
    everything = [event["seq"] for event in service.events(job_id)]

    def page(**query: Any) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = service.user.get(
            f"/v1/jobs/{job_id}/events", params=query
        ).json()["data"]
        return events

    newest = page(order="desc", limit=3)
    assert [event["seq"] for event in newest] == everything[::-1][:3]
    older = page(order="desc", limit=1000, after=newest[-1]["id"])
    assert [event["seq"] for event in [*newest, *older]] == everything[::-1]
    assert [
        event["message"] for event in page(level="warn,error", type="placement.waiting")
    ] == [
        "1",
        "2",
        "4",
    ]
    assert [
        event["message"] for event in page(level="warn,error", order="desc", limit=1)
    ] == ["4"]


def attempts(service: Any, job_id: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = service.user.get(f"/v1/jobs/{job_id}/attempts").json()[
        "data"
    ]
    return rows


@pytest.mark.parametrize(
    ("end", "state"),
    [("succeeded", "succeeded"), ("failed", "stopped"), ("cancelled", "stopped")],
)
def test_an_attempt_whose_end_nobody_told_ends_with_its_job(
    service: Any, end: str, state: str
) -> None:
    job_id, driver = service.running_job()
    (open_,) = attempts(service, job_id)
    assert open_["ended_at"] is None
    driver.states(end, attempt=1)
    (closed,) = attempts(service, job_id)
    assert closed["state"] == state
    assert closed["ended_at"] == service.job(job_id)["ended_at"] is not None


def test_late_words_leave_an_ended_job_s_attempts_closed(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.states("failed", reason="worker_died", attempt=1)
    driver.send(("attempt", {"state": "running"}), attempt=1)
    driver.send(
        ("attempt", {"state": "starting", "world_size": 4}),
        ("ranks", {"ranks": [{"rank": 0}]}),
        attempt=2,
    )
    assert [
        (row["state"], row["ended_at"] is None) for row in attempts(service, job_id)
    ] == [
        ("stopped", False),
        ("stopped", False),
    ]
    driver.send(
        ("attempt", {"state": "failed", "reason": "worker_died", "message": "rank 0 died"}),
        attempt=1,
    )
    assert attempts(service, job_id)[0]["message"] == "rank 0 died"
    assert service.job(job_id)["failures"] == 1


def test_checkpoint_now_raises_the_counter(service: Any) -> None:
    job_id, driver = service.running_job()
    revision = driver.desired()["revision"]
    assert service.user.post(f"/v1/jobs/{job_id}/checkpoint").status_code == 202
    desired = driver.desired(revision, 5)
    assert desired["checkpoint_requests"] == 1
    assert desired["revision"] > revision


CULPRIT = {"rank": 1, "node_id": "n1", "address": "10.0.0.1", "gpu": 3, "pid": 77}
DIAGNOSIS: dict[str, Any] = {
    "trigger": "hang",
    "reason": "rank 1 has not entered all_reduce 8 of tp, in which rank 0 has waited for 11 s",
    "confidence": "high",
    "quiet_s": 10.2,
    "culprits": [CULPRIT],
    "num_ranks": 2,
    "num_silent": 0,
    "ranks": [
        {**CULPRIT, "answered": True, "phase": "data", "step": 4, "threads": []},
        {
            "rank": 0,
            "answered": True,
            "waits_in": {"operation": "all_reduce", "axis": "tp", "number": 8}
            | {"peer": None, "seconds": 11.0},
        },
    ],
    "stacks": [{"ranks": [1], "lines": ["read (megatron_ray/data/indexed.py:88)"]}],
}


def test_a_diagnosis_is_requested_stored_and_served(service: Any) -> None:
    job_id, driver = service.running_job()
    path = f"/v1/jobs/{job_id}/diagnosis"
    missing = service.user.get(path)
    assert missing.status_code == 404
    assert [error["code"] for error in missing.json()["errors"]] == ["no_diagnosis"]
    assert service.user.post(path).status_code == 202
    assert driver.desired()["diagnosis_requests"] == 1
    driver.send(("diagnosis", DIAGNOSIS | {"trigger": "request"}), attempt=1)
    driver.send(("diagnosis", DIAGNOSIS | {"a_later_field": 1}), attempt=1)
    served = service.user.get(path).json()
    assert served["trigger"] == "hang"
    assert served["reason"] == DIAGNOSIS["reason"]
    assert served["culprits"] == [CULPRIT]
    assert served["ranks"][1]["waits_in"]["number"] == 8
    assert served["stacks"] == DIAGNOSIS["stacks"]
    *_, requested, answered, hung = service.events(job_id)
    assert types([requested, answered, hung]) == [
        "diagnosis.requested",
        "job.diagnosed",
        "attempt.hang",
    ]
    assert (hung["level"], hung["ranks"], hung["message"]) == (
        "warn",
        [1],
        DIAGNOSIS["reason"],
    )
    assert hung["id"] == served["id"]
    assert hung["data"]["culprits"][0]["node_id"] == "n1"


def test_a_job_keeps_its_newest_diagnoses_and_none_once_deleted(service: Any) -> None:
    job_id, driver = service.running_job()
    for number in range(25):
        driver.send(("diagnosis", DIAGNOSIS | {"quiet_s": number}), attempt=1)
    path = f"/v1/jobs/{job_id}/diagnosis"
    assert service.user.get(path).json()["quiet_s"] == 24
    driver.states("succeeded", attempt=1)
    refused = service.user.post(path)
    assert (refused.status_code, refused.json()["code"]) == (409, "job_ended")
    assert service.user.get(path).status_code == 200
    assert service.user.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert service.user.get(path).status_code == 404


def test_a_job_without_ranks_cannot_be_diagnosed(service: Any) -> None:
    job_id = service.submit()["id"]
    refused = service.user.post(f"/v1/jobs/{job_id}/diagnosis")
    assert (refused.status_code, refused.json()["code"]) == (409, "job_not_running")


def test_ranks_that_are_slow_now_are_marked(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.send(("ranks", {"ranks": ranks(2)}), attempt=1)

    def event(event_type: str, rank: int) -> tuple[str, dict[str, Any]]:
        return "event", {"type": event_type, "ranks": [rank], "data": {"ratio": 1.8}}

    driver.send(event("rank.slow", 0), event("rank.slow", 1), attempt=1)
    driver.send(event("rank.recovered", 0), attempt=1)
    first, second = service.user.get(f"/v1/jobs/{job_id}/ranks").json()["data"]
    assert first.get("slow") is None
    assert second["slow"]["ratio"] == 1.8
    assert second["slow"]["since"]


def test_deleted_checkpoints_are_not_listed(service: Any) -> None:
    job_id, driver = service.running_job()
    for step in (5, 10):
        driver.send(
            ("checkpoint", {"action": "committed", "step": step, "path": f"/c/{step}"}),
            attempt=1,
        )
    driver.send(("checkpoint", {"action": "deleted", "step": 5, "path": "/c/5"}), attempt=1)
    assert [
        item["step"]
        for item in service.user.get(f"/v1/jobs/{job_id}/checkpoints").json()["data"]
    ] == [10]


def test_delete_takes_only_ended_jobs_and_leaves_the_id_known(service: Any) -> None:
    job_id, driver = service.running_job()
    refused = service.user.delete(f"/v1/jobs/{job_id}")
    assert refused.status_code == 409
    assert refused.json()["code"] == "job_active"
    assert "cancel" in refused.json()["detail"]
    driver.states("succeeded", attempt=1)
    assert service.user.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert service.user.get(f"/v1/jobs/{job_id}").status_code == 404
    assert service.user.get("/v1/jobs").json()["data"] == []
    assert job_id in service.agent.desired().terminal, "its actors may still be reaped"


def test_restart_keeps_everything(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.steps(1, 10)
    before = (
        service.job(job_id),
        service.events(job_id),
        service.user.get(f"/v1/jobs/{job_id}/metrics").json(),
    )
    hello = service.agent.http.get("/internal/v1/agent/hello").json()
    revision = service.agent.desired().revision
    token = driver.http.headers["Authorization"]
    service.restart()
    assert service.agent.http.get("/internal/v1/agent/hello").json() == hello
    assert (
        service.job(job_id),
        service.events(job_id),
        service.user.get(f"/v1/jobs/{job_id}/metrics").json(),
    ) == before
    assert service.agent.desired().revision == revision
    driver.http = service.client(token.removeprefix("Bearer "))
    assert driver.cursor().json()["stored"] == {"driver": 5, "a1/r0": 10}
    driver.steps(11, 12)
    assert service.job(job_id)["progress"]["step"] == 12


def test_terminal_jobs_whose_driver_is_still_seen_are_listed_for_the_agent(
    service: Any, make_node: Callable[..., Any]
) -> None:
    job_id, driver = service.running_job()
    driver.states("succeeded", attempt=1)
    assert service.agent.desired().jobs == ()
    service.agent.report(make_node(), drivers=[{"job_id": job_id, "alive": True}])
    reply = service.agent.desired()
    assert [job.job_id for job in reply.jobs] == [job_id]
    assert job_id in reply.terminal


def test_agent_poll_returns_after_its_wait_and_when_the_revision_went_back(
    service: Any, make_node: Callable[..., Any]
) -> None:
    service.agent.report(make_node())
    revision = service.agent.desired().revision
    began = time.monotonic()
    assert service.agent.desired(revision, 0.3).revision == revision
    assert 0.25 < time.monotonic() - began < 3
    began = time.monotonic()
    assert service.agent.desired(revision + 100, 20).revision == revision
    assert time.monotonic() - began < 3, "another database: answer at once"


def test_listing_pages_filters_and_stays_stable_under_inserts(
    service: Any, spec: dict[str, Any]
) -> None:
    made = [
        service.submit(spec | {"metadata": {"team": "ab"[i % 2], "odd": str(i % 2)}})["id"]
        for i in range(5)
    ]
    first = service.user.get("/v1/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in first["data"]] == made[:2:-1]
    assert first["has_more"]
    assert first["last_id"] == made[3]
    assert "spec" not in first["data"][0]
    service.submit(spec)
    second = service.user.get(
        "/v1/jobs", params={"limit": 2, "after": first["last_id"]}
    ).json()
    assert [job["id"] for job in second["data"]] == [made[2], made[1]]
    third = service.user.get(
        "/v1/jobs", params={"limit": 2, "after": second["last_id"]}
    ).json()
    assert [job["id"] for job in third["data"]] == [made[0]]
    assert not third["has_more"]
    labelled = service.user.get(
        "/v1/jobs", params={"metadata[team]": "a", "metadata[odd]": "0"}
    ).json()["data"]
    assert [job["id"] for job in labelled] == [made[4], made[2], made[0]]
    service.user.post(f"/v1/jobs/{made[0]}/cancel")
    ended = service.user.get("/v1/jobs", params={"status": "cancelled,failed"}).json()[
        "data"
    ]
    assert [job["id"] for job in ended] == [made[0]]


def test_same_key_and_body_gives_the_first_answer_also_at_the_same_time(
    service: Any, spec: dict[str, Any]
) -> None:
    answers: list[httpx.Response] = []
    send = [
        threading.Thread(
            target=lambda: answers.append(
                service.user.post("/v1/jobs", json=spec, headers={"Idempotency-Key": "k1"})
            )
        )
        for _ in range(8)
    ]
    for thread in send:
        thread.start()
    for thread in send:
        thread.join(20)
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 7
    assert len(service.user.get("/v1/jobs").json()["data"]) == 1
    service.restart()
    again = service.user.post("/v1/jobs", json=spec, headers={"Idempotency-Key": "k1"})
    assert again.json() == answers[0].json()
    assert again.headers["Location"] == f"/v1/jobs/{again.json()['id']}"


def test_key_of_a_refused_request_may_be_used_again(
    service: Any, spec: dict[str, Any]
) -> None:
    wrong = spec | {"parallel": {"tp": 3}}
    assert (
        service.user.post(
            "/v1/jobs", json=wrong, headers={"Idempotency-Key": "k"}
        ).status_code
        == 422
    )
    assert (
        service.user.post(
            "/v1/jobs", json=spec, headers={"Idempotency-Key": "k"}
        ).status_code
        == 201
    )


def test_cancel_is_repeatable_with_a_key(service: Any) -> None:
    job_id, driver = service.running_job()
    headers = {"Idempotency-Key": "c1"}
    first = service.user.post(f"/v1/jobs/{job_id}/cancel", json={}, headers=headers)
    driver.states("cancelled", attempt=1)
    assert (
        service.user.post(f"/v1/jobs/{job_id}/cancel", json={}, headers=headers).json()
        == first.json()
    )


def test_agents_look_at_the_paths_refuses_before_anything_is_stored(
    start: Callable[..., Any],
    settings: Any,
    spec: dict[str, Any],
    make_node: Callable[..., Any],
) -> None:
    service = start(settings.model_copy(update={"check_wait_s": 10.0}))
    problem = {
        "pointer": "/data/train/0/path",
        "code": "not_found",
        "detail": "/nowhere.txt does not exist; correct the path",
    }
    service.agent.report(make_node())
    with service.agent as agent:
        agent.answer_checks(problem, notes=("corpus: 1 file (a.md) is not read",))
        response = service.user.post("/v1/jobs", json=spec)
        plan = service.user.post("/v1/plans", json=spec).json()
    assert response.status_code == 422
    assert response.json()["errors"] == [problem]
    assert service.user.get("/v1/jobs").json()["data"] == []
    assert plan["problems"] == [problem]
    assert plan["fits"] is True
    assert plan["notes"] == ["corpus: 1 file (a.md) is not read"]


def test_silent_agent_does_not_hold_a_submission_back(
    service: Any, make_node: Callable[..., Any]
) -> None:
    service.agent.report(make_node())
    began = time.monotonic()
    assert service.submit()["status"] == "preparing"
    assert time.monotonic() - began < 5
    assert service.agent.desired().checks == ()
