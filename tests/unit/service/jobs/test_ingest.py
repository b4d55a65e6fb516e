"""What drivers say: numbering, fencing, and what each kind of record does to a job."""

import math
import random
from typing import Any

import pytest

PROBLEM = "application/problem+json"


def test_batches_sent_again_or_overlapping_change_nothing(
    service: Any, make_step: Any
) -> None:
    job_id, driver = service.running_job()
    records = driver.number(
        "a1/r0", *(("step", make_step(step)) for step in range(1, 101)), attempt=1
    )
    rng = random.Random(7)
    stored = 0
    while stored < 100:
        first = rng.randint(max(0, stored - 20), stored)
        batch = records[first : first + rng.randint(1, 30)]
        for _ in range(rng.randint(1, 2)):
            answer = driver.post("a1/r0", batch).json()
        stored = max(stored, batch[-1]["n"])
        assert answer["stored"] == stored
    rows = service.user.get(f"/v1/jobs/{job_id}/metrics").json()["data"]
    assert [row["step"] for row in rows] == list(range(1, 101))
    before = service.events(job_id)
    events = driver.number(
        "driver", *(("event", {"type": "test.note", "message": str(i)}) for i in range(5))
    )
    for batch in (events[:3], events[:3], events[1:], events):
        driver.post("driver", batch)
    after = service.events(job_id)[len(before) :]
    assert [event["message"] for event in after] == list("01234")
    assert [event["seq"] for event in after] == list(
        range(len(before) + 1, len(before) + 6)
    )


def test_gaps_are_refused_and_leave_nothing_behind(service: Any) -> None:
    job_id, driver = service.running_job()
    before = service.events(job_id)
    note = {"kind": "event", "at": 0, "data": {"type": "test.note"}}
    for numbers in ([7], [6, 8], [6, 6], [6, 5]):
        response = driver.post("driver", [note | {"n": n} for n in numbers])
        body = response.json()
        if numbers == [6, 5]:
            assert response.status_code == 200, (
                "5 is stored already, so 6 is the only new one"
            )
            continue
        assert (response.status_code, body["code"], body["stored"]) == (409, "gap", 5)
        assert "resend from n=6" in body["detail"], (
            "a batch that has a hole is not stored at all"
        )
    assert len(service.events(job_id)) == len(before) + 1


def test_lower_epochs_are_fenced_everywhere(service: Any) -> None:
    job_id, old = service.running_job()
    new = service.driver(job_id, epoch=2)
    assert new.cursor().json() == {"protocol": 1, "stored": {"driver": 5}}
    for response in (
        old.cursor(),
        old.post("driver", old.number("driver", ("state", {"state": "succeeded"}))),
    ):
        assert response.status_code == 409
        assert response.json()["code"] == "fenced"
        assert response.json()["epoch"] == 2
        assert response.headers["content-type"] == PROBLEM
        assert "exit without changing anything" in response.json()["detail"]
    assert service.job(job_id)["status"] == "running"
    zero = service.driver(job_id, epoch=0)
    assert zero.cursor().status_code == 409
    new.next_n["driver"] = 6
    new.states("recovering", attempt=1)
    assert service.job(job_id)["status"] == "recovering"


def test_a_batch_is_stored_whole_or_not_at_all(service: Any, make_step: Any) -> None:
    job_id, driver = service.running_job()
    before = service.job(job_id), service.events(job_id)
    facts = (
        ("event", {"type": "test.note"}),
        ("step", make_step(1)),
        ("step", {"loss": 1.0}),
    )
    response = driver.post("driver", driver.number("driver", *facts, attempt=1))
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == [
        "/records/2/data/step"
    ]
    assert (service.job(job_id), service.events(job_id)) == before
    assert service.user.get(f"/v1/jobs/{job_id}/metrics").json()["data"] == []


@pytest.mark.parametrize(
    ("kind", "data", "pointer"),
    [
        ("state", {"state": "dancing"}, "/records/0/data/state"),
        ("state", {}, "/records/0/data/state"),
        ("state", {"state": "running", "reason": "mood"}, "/records/0/data/reason"),
        ("attempt", {"state": "odd"}, "/records/0/data/state"),
        ("event", {"type": ""}, "/records/0/data/type"),
        ("event", {"type": "end"}, "/records/0/data/type"),
        ("event", {"type": "two\nlines.of"}, "/records/0/data/type"),
        ("event", {"type": "a.b", "level": "loud"}, "/records/0/data/level"),
        ("ranks", {}, "/records/0/data/ranks"),
        ("checkpoint", {"step": 1}, "/records/0/data/path"),
        (
            "checkpoint",
            {"step": 1, "path": "p", "action": "eaten"},
            "/records/0/data/action",
        ),
        ("problem", {"problems": []}, "/records/0/data/problems"),
        ("step", {"step": -1}, "/records/0/data/step"),
        ("eval", {"step": 1}, "/records/0/data/split"),
    ],
)
def test_malformed_records_are_named(
    service: Any, kind: str, data: dict[str, Any], pointer: str
) -> None:
    _, driver = service.running_job()
    response = driver.post("driver", driver.number("driver", (kind, data), attempt=1))
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == pointer
    assert f"a record of kind {kind}" in response.json()["detail"]


def test_malformed_batches_are_refused(service: Any) -> None:
    job_id, driver = service.running_job()
    cases: list[tuple[dict[str, Any], int, str | None]] = [
        ({"source": "elsewhere"}, 422, "/source"),
        ({"protocol": 99}, 409, None),
        ({"protocol": -1}, 409, None),
        ({"job_id": "job-other"}, 422, None),
        ({"epoch": "x"}, 422, "/epoch"),
        ({"records": [{"n": 0, "at": 0, "kind": "event"}]}, 422, "/records/0/n"),
    ]
    for change, status, pointer in cases:
        response = driver.post(**{"source": "driver", "records": [], **change})
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == PROBLEM, response.text
        if pointer:
            assert response.json()["errors"][0]["pointer"] == pointer
    assert driver.post("driver", [], protocol=99).json()["protocol"] == 1
    assert driver.post("driver", [], protocol=0).status_code == 200, (
        "the version before is spoken too"
    )
    raw = driver.http.post(f"/internal/v1/jobs/{job_id}/records", content=b"{not json")
    assert raw.status_code == 422
    assert "invalid JSON" in raw.json()["detail"]


def test_unknown_kinds_are_kept_as_they_came(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.send(
        ("aurora", {"colour": "green", "odd": math.nan, "list": [math.inf, 1]}), attempt=1
    )
    event = service.events(job_id)[-1]
    assert event["type"] == "record.aurora"
    assert event["data"] == {
        "colour": "green",
        "odd": None,
        "list": [None, 1],
    }


def test_numbers_that_are_not_finite_become_null(service: Any, make_step: Any) -> None:
    job_id, driver = service.running_job()
    driver.send(
        (
            "step",
            make_step(
                1,
                loss=math.nan,
                grad_norm=math.inf,
                split_s={"data": math.nan},
                other_losses={"z_loss": 2.5},
                skipped_steps=2,
                loss_scale=65536.0,
                weight_decay=0.05,
            ),
        ),
        ("eval", {"step": 1, "split": "validation", "loss": math.nan}),
        source="a1/r0",
        attempt=1,
    )
    row = service.user.get(
        f"/v1/jobs/{job_id}/metrics",
        params={
            "keys": "loss,grad_norm,lr,split_s,other_losses,skipped_steps,loss_scale,weight_decay"
        },
    ).json()["data"][0]
    assert row == {
        "step": 1,
        "attempt": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 1e-3,
        "split_s": {"data": None},
        "other_losses": {"z_loss": 2.5},
        "skipped_steps": 2,
        "loss_scale": 65536.0,
        "weight_decay": 0.05,
    }
    assert "not finite" in service.events(job_id)[-1]["message"]
    assert service.job(job_id)["progress"]["loss"] is None


def test_last_words_with_a_nul_in_them_are_stored(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.send(
        ("event", {"type": "test.note", "message": "a\0b", "data": {"traceback": "c\0d"}})
    )
    event = service.events(job_id)[-1]
    assert event["message"] in ("a\0b", "a\N{REPLACEMENT CHARACTER}b"), (
        "Postgres has no NUL"
    )
    assert event["data"] == {"traceback": "c\0d"}


def test_states_that_may_not_follow_are_kept_and_change_nothing(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.states("scheduling", attempt=1)
    assert service.job(job_id)["status"] == "running"
    event = service.events(job_id)[-1]
    assert event["type"] == "job.state_ignored"
    assert (
        event["message"]
        == "ignored state scheduling from the driver; the job stays running"
    )


def test_after_a_resume_the_highest_attempt_of_a_step_is_shown(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.steps(1, 8, loss=1.0)
    driver.steps(5, 6, attempt=2, loss=2.0)
    get = service.user.get
    rows = get(f"/v1/jobs/{job_id}/metrics", params={"keys": "loss"}).json()["data"]
    assert [(row["step"], row["attempt"]) for row in rows] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 2),
        (6, 2),
        (7, 1),
        (8, 1),
    ]
    first = get(
        f"/v1/jobs/{job_id}/metrics", params={"keys": "loss", "attempt": 1, "from_step": 4}
    ).json()["data"]
    assert [(row["step"], row["loss"]) for row in first] == [
        (step, 1.0) for step in range(4, 9)
    ]
    job = service.job(job_id)
    assert job["progress"]["step"] == 6
    assert job["attempt"] == 2


def test_a_late_row_of_an_earlier_attempt_does_not_move_progress_back(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.steps(1, 4, attempt=2)
    driver.steps(1, 9, attempt=1)
    assert service.job(job_id)["progress"]["step"] == 4


def test_long_series_come_in_pages_or_thinned(service: Any, make_step: Any) -> None:
    job_id, driver = service.running_job()
    spike = {777: 50.0, 4000: -50.0}
    for first in range(1, 12001, 4000):
        facts = [
            ("step", make_step(step, loss=spike.get(step, 1.0)))
            for step in range(first, first + 4000)
        ]
        driver.send(*facts, source="a1/r0", attempt=1)
    get = service.user.get
    page = get(f"/v1/jobs/{job_id}/metrics", params={"keys": "loss"}).json()
    assert len(page["data"]) == 10000
    assert page["has_more"]
    assert page["last_id"] == "10000"
    rest = get(
        f"/v1/jobs/{job_id}/metrics",
        params={"keys": "loss", "from_step": int(page["last_id"]) + 1},
    ).json()
    assert len(rest["data"]) == 2000
    assert not rest["has_more"]
    for keys in ("loss", "loss,split_s"):
        thin = get(
            f"/v1/jobs/{job_id}/metrics", params={"keys": keys, "max_points": 50}
        ).json()["data"]
        steps = [row["step"] for row in thin]
        assert len(steps) <= 50
        assert steps == sorted(steps)
        assert {1, 777, 4000, 12000} <= set(steps)
        assert ("split_s" in thin[0]) == ("split_s" in keys)
    few = get(
        f"/v1/jobs/{job_id}/metrics", params={"max_points": 50, "from_step": 11990}
    ).json()["data"]
    assert [row["step"] for row in few] == list(range(11990, 12001))
