"""Validation losses as series of metrics, and the steps of a number of epochs."""

import math
from typing import Any

import pytest


def evaluated(driver: Any, step: int, attempt: int = 1, **fields: Any) -> None:
    data = {"step": step, "split": "validation", "num_tokens": 9, **fields}
    driver.send(("eval", data), source=f"a{attempt}/r0", attempt=attempt)


def series(service: Any, job_id: str, **params: Any) -> list[dict[str, Any]]:
    response = service.user.get(f"/v1/jobs/{job_id}/metrics", params=params)
    assert response.status_code == 200, response.text
    rows: list[dict[str, Any]] = response.json()["data"]
    return rows


def values(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in ("step", *names)) for row in rows]


def test_each_evaluation_is_a_point_of_the_blend_and_of_each_source(service: Any) -> None:
    job_id, driver = service.running_job()
    evaluated(driver, 2, loss=3.0, source_losses={"en/a.jsonl": 2.0, "b": 4.0})
    driver.steps(1, 4, loss=5.0)
    evaluated(driver, 4, loss=2.0, source_losses={"en/a.jsonl": 1.5, "b": 2.5})
    rows = series(service, job_id, keys="val_loss,val_loss/en/a.jsonl, val_loss/b")
    assert values(rows, "val_loss", "val_loss/en/a.jsonl", "val_loss/b") == [
        (2, 3.0, 2.0, 4.0),
        (4, 2.0, 1.5, 2.5),
    ]
    beside = series(service, job_id, keys="loss,val_loss")
    assert values(beside, "loss", "val_loss") == [
        (1, 5.0, None),
        (2, 5.0, 3.0),
        (3, 5.0, None),
        (4, 5.0, 2.0),
    ]
    assert values(series(service, job_id, keys="val_loss", from_step=3), "val_loss") == [
        (4, 2.0)
    ]
    progress = service.job(job_id)["progress"]
    assert progress["val_loss"] == 2.0
    assert progress["source_val_losses"] == {"en/a.jsonl": 1.5, "b": 2.5}
    event = service.events(job_id)[-1]
    assert event["message"] == (
        "validation loss at step 4: 2.0000 (en/a.jsonl 1.5000, b 2.5000)"
    )


def test_parts_of_other_metrics_are_series_too(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.steps(1, 2, split_s={"data": 0.25}, other_losses={"z_loss": 7.0})
    rows = series(service, job_id, keys="split_s/data,other_losses/z_loss,split_s/none")
    assert values(rows, "split_s/data", "other_losses/z_loss", "split_s/none") == [
        (1, 0.25, 7.0, None),
        (2, 0.25, 7.0, None),
    ]
    thinned = series(service, job_id, keys="split_s/data,split_s", max_points=2)
    assert thinned[0]["split_s"] == {"data": 0.25}


def test_an_older_driver_reports_the_blend_only(service: Any) -> None:
    job_id, driver = service.running_job()
    evaluated(driver, 1, loss=3.0)
    evaluated(driver, 2, loss=math.nan, source_losses={"a": math.nan})
    rows = series(service, job_id, keys="val_loss,val_loss/a")
    assert values(rows, "val_loss", "val_loss/a") == [(1, 3.0, None), (2, None, None)]
    messages = [event["message"] for event in service.events(job_id)[-2:]]
    assert messages == [
        "validation loss at step 1: 3.0000",
        "validation loss at step 2: not finite",
    ]


def test_after_a_resume_the_highest_attempt_of_an_evaluation_is_shown(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.steps(1, 4)
    evaluated(driver, 2, loss=3.0)
    evaluated(driver, 4, loss=2.0)
    driver.steps(3, 4, attempt=2)
    beside = series(service, job_id, keys="loss,val_loss")
    # The new attempt has taken step 4 again and not evaluated it yet.
    assert values(beside, "attempt", "val_loss") == [
        (1, 1, None),
        (2, 1, 3.0),
        (3, 2, None),
        (4, 2, None),
    ]
    evaluated(driver, 4, attempt=2, loss=1.0)
    alone = series(service, job_id, keys="val_loss")
    assert values(alone, "attempt", "val_loss") == [(2, 1, 3.0), (4, 2, 1.0)]
    first = series(service, job_id, keys="val_loss", attempt=1)
    assert values(first, "val_loss") == [(2, 3.0), (4, 2.0)]


def test_a_thinned_series_keeps_the_extremes_of_the_evaluations(service: Any) -> None:
    job_id, driver = service.running_job()
    driver.steps(1, 200)
    for step in range(10, 201, 10):
        evaluated(driver, step, loss=9.0 if step == 70 else 2.0)
    rows = series(service, job_id, keys="loss,val_loss", max_points=20)
    assert len(rows) <= 20
    assert (70, 9.0) in values(rows, "val_loss")


@pytest.mark.parametrize("key", ["val_loss/", "loss/a", "val", "/a"])
def test_unknown_series_are_refused_with_the_known_ones(service: Any, key: str) -> None:
    job_id, _ = service.running_job()
    response = service.user.get(f"/v1/jobs/{job_id}/metrics", params={"keys": key})
    assert response.status_code == 422
    detail = response.json()["errors"][0]["detail"]
    assert "val_loss, monitors, and parts of some: " in detail
    assert "val_loss/NAME" in detail


def test_the_steps_of_epochs_are_known_once_the_data_are_prepared(
    service: Any, spec: dict[str, Any], make_node: Any
) -> None:
    service.agent.report(make_node(cpus=4))
    del spec["training"]["steps"]
    spec["training"]["epochs"] = 2
    plan = service.user.post("/v1/plans", json=spec).json()
    assert plan["resolved_spec"]["training"]["steps"] is None
    assert any("the number of steps of training.epochs" in note for note in plan["notes"])
    job_id = service.submit(spec)["id"]
    assert service.job(job_id)["progress"]["steps"] is None
    driver = service.driver(job_id)
    part = {"num_tokens": 1234, "num_documents": 5}
    manifest = {"train": [part, part], "validation": [part], "vocab_size": 300}
    driver.send(("prepared", {"manifest": manifest, "steps": 77}))
    job = service.job(job_id)
    assert job["progress"]["steps"] == 77
    training = job["resolved_spec"]["training"]
    assert (training["steps"], training["epochs"]) == (77, None)
    assert job["spec"]["training"]["epochs"] == 2
    prepared = [e for e in service.events(job_id) if e["type"] == "job.prepared"]
    assert prepared[0]["message"] == (
        "data ready: 2,468 training tokens in 10 documents, 1,234 validation tokens in 5 "
        "documents, vocabulary 300"
    )


def test_tokens_are_steps_in_the_plan(service: Any, spec: dict[str, Any]) -> None:
    del spec["training"]["steps"]
    spec["training"]["tokens"] = 100_000
    training = service.user.post("/v1/plans", json=spec).json()["resolved_spec"]["training"]
    batch = training["global_batch_size"] * training["seq_length"]
    assert (training["steps"], training["tokens"]) == (-(-100_000 // batch), None)
