"""Clusters that are made for one job each: named by a pattern, there while they are needed."""

from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings
from tests.unit.service.conftest import SPEC, node

OWN = {"cluster": "rayjob-7"}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"clusters": ("rayjob-*", "default")})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("default", True),
        ("rayjob-7", True),
        ("rayjob-", True),
        ("rayjob-*", False),
        ("rayjob", False),
        ("defaults", False),
    ],
)
def test_a_pattern_stands_for_all_names_that_begin_so(name: str, expected: bool) -> None:
    settings = Settings(clusters=("default", "rayjob-*"), data_dir=Path("/data"))
    assert settings.has_cluster(name) is expected


def test_a_job_waits_for_the_cluster_that_is_made_for_it(service: Any) -> None:
    job = service.submit({**SPEC, **OWN})
    assert (job["status"], job["status_reason"]) == ("preparing", "waiting_agent")
    assert job["message"] == "waiting for the agent of cluster 'rayjob-7'"
    # It appears with its agent.
    assert names(service) == ["default"]
    service.agent.report(node(), **OWN)
    assert names(service) == ["default", "rayjob-7"]
    assert service.job(job["id"])["status_reason"] == "preparing_data"


def test_the_health_of_the_service_does_not_depend_on_it(service: Any) -> None:
    service.submit({**SPEC, **OWN})
    service.agent.report(node())
    answer = service.user.get("/readyz").json()
    assert answer["status"] == "ok"
    assert [agent["cluster"] for agent in answer["agents"]] == ["default"]


def test_names_outside_of_the_pattern_are_refused(service: Any) -> None:
    response = service.user.post("/v1/jobs", json={**SPEC, "cluster": "rayjobs"})
    (error,) = response.json()["errors"]
    assert error["pointer"] == "/cluster"
    expected = "cluster 'rayjobs' is not configured here; did you mean 'rayjob-*'?"
    assert error["detail"] == expected


def test_the_agent_receives_the_state_of_all_jobs_of_its_cluster(service: Any) -> None:
    service.agent.report(node(), **OWN)
    service.submit()
    ended = service.submit({**SPEC, **OWN})["id"]
    service.user.post(f"/v1/jobs/{ended}/cancel")
    waiting = service.submit({**SPEC, **OWN})["id"]
    assert desired_states(service) == {ended: "cancelled", waiting: "preparing"}


def test_a_job_that_has_no_size_yet_is_among_them(service: Any) -> None:
    # Else the agent would take its cluster for idle.
    waiting = service.submit({**SPEC, **OWN})["id"]
    assert desired_states(service) == {waiting: "preparing"}


def desired_states(service: Any) -> Any:
    parameters = {"cluster": "rayjob-7", "after": -1, "wait_s": 0}
    reply = service.agent.http.get("/internal/v1/agent/desired", params=parameters)
    return reply.json()["states"]


def names(service: Any) -> list[str]:
    return [cluster["name"] for cluster in service.user.get("/v1/cluster").json()["data"]]
