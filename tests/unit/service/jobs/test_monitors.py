"""Numbers of a job's callbacks as series of metrics."""

import math
from typing import Any

from megatron_ray.reports import MonitorReport

RMS = "activation_rms/layers.0"
NORM = "grad_norm/layers.0.attention.q.weight"


def measured(driver: Any, step: int, attempt: int = 1, **numbers: float) -> None:
    names = {"rms": RMS, "norm": NORM}
    data = {"step": step, "numbers": {names[key]: value for key, value in numbers.items()}}
    driver.send((MonitorReport.kind, data), source=f"a{attempt}/r0", attempt=attempt)


def series(service: Any, job_id: str, keys: str, **params: Any) -> list[dict[str, Any]]:
    params["keys"] = keys
    response = service.user.get(f"/v1/jobs/{job_id}/metrics", params=params)
    assert response.status_code == 200, response.text
    rows: list[dict[str, Any]] = response.json()["data"]
    return rows


def test_numbers_are_chosen_by_name(service: Any) -> None:
    job_id, driver = service.running_job()
    for step in (1, 2, 3, 4):
        if step % 2 == 0:
            measured(driver, step, rms=step / 2, norm=0.5)
        driver.steps(step, step, loss=5.0)
    rows = series(service, job_id, f"monitors/{RMS},loss")
    values = [(row["step"], row[f"monitors/{RMS}"], row["loss"]) for row in rows]
    assert values == [(1, None, 5.0), (2, 1.0, 5.0), (3, None, 5.0), (4, 2.0, 5.0)]
    alone = series(service, job_id, f"monitors/{RMS},monitors/{NORM}", from_step=3)
    row = {"step": 4, "attempt": 1, f"monitors/{RMS}": 2.0, f"monitors/{NORM}": 0.5}
    assert alone == [row]
    (first, _) = series(service, job_id, "monitors")
    assert first["monitors"] == {RMS: 1.0, NORM: 0.5}
    thinned = series(service, job_id, f"monitors/{RMS}", max_points=2)
    assert [row["step"] for row in thinned] == [2, 4]


def test_a_step_with_a_number_that_is_not_finite_is_shown(service: Any) -> None:
    job_id, driver = service.running_job()
    measured(driver, 1, norm=1.0)
    measured(driver, 2, rms=math.nan)
    rows = series(service, job_id, f"monitors/{RMS}")
    assert [(row["step"], row[f"monitors/{RMS}"]) for row in rows] == [(2, None)]
    assert series(service, job_id, "monitors/typo") == []


def test_after_a_resume_the_numbers_of_the_highest_attempt_are_shown(service: Any) -> None:
    job_id, driver = service.running_job()
    measured(driver, 1, rms=1.0)
    measured(driver, 2, rms=2.0)
    measured(driver, 2, attempt=2, rms=3.0)
    rows = series(service, job_id, f"monitors/{RMS}")
    assert [(row["step"], row["attempt"], row[f"monitors/{RMS}"]) for row in rows] == [
        (1, 1, 1.0),
        (2, 2, 3.0),
    ]
    first = series(service, job_id, f"monitors/{RMS}", attempt=1)
    assert [row[f"monitors/{RMS}"] for row in first] == [1.0, 2.0]


def test_records_that_are_no_numbers_are_refused(service: Any) -> None:
    _, driver = service.running_job()
    data = {"step": 1, "numbers": {RMS: "much"}}
    record = driver.number("a1/r0", (MonitorReport.kind, data), attempt=1)
    response = driver.post("a1/r0", record)
    assert response.status_code == 422
    assert f"numbers/{RMS} must be a number" in response.text.replace("~1", "/")
