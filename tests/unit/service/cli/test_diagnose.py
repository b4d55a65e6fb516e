"""`megatron-ray diagnose`, and slow ranks in `show` and `ranks`."""

import copy
import json
from typing import Any

import pytest

from service.api.examples import RESPONSES
from tests.support.fake_rest_service import JOB, FakeService, Run

PATH = "/v1/jobs/job-abc/diagnosis"
NONE_YET = {
    "code": "not_found",
    "detail": "the job has no diagnosis",
    "errors": [{"pointer": "/path/job_id", "code": "no_diagnosis", "detail": "none"}],
}


@pytest.fixture
def diagnosis() -> dict[str, Any]:
    body: dict[str, Any] = copy.deepcopy(RESPONSES["get_diagnosis"])
    body["job_id"] = "job-abc"
    wait = {"operation": "all_reduce", "axis": "tp", "number": 812, "peer": None}
    place = {"address": "192.0.2.2", "step": 41, "memory_bytes": 3 << 28, "load": 1.5}
    body["ranks"] = [
        {"rank": 1, "pid": 23685, "answered": True, "phase": "data", **place},
        {
            "rank": 0,
            "pid": 23679,
            "answered": True,
            "phase": "forward_backward",
            "microbatch": 2,
            "waits_in": {**wait, "seconds": 12.04},
            **place,
        },
        {"rank": 2, "pid": 23690, "address": "192.0.2.3", "answered": False},
    ]
    body["num_ranks"] = 3
    return body


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.commands.ranks.diagnose._POLL_S", 0.01)


def test_the_culprit_its_wait_and_its_stack_are_printed(
    run: Run, service: FakeService, diagnosis: dict[str, Any], quick: None
) -> None:
    service.routes[f"POST {PATH}"] = (202, JOB)
    before = {**diagnosis, "id": "job-abc.9"}
    service.routes[f"GET {PATH}"] = (200, [before, before, diagnosis])
    code, out, _ = run("diagnose", "job-abc", "--url", service.url)
    assert code == 0
    assert f"POST {PATH}" in [request for request, _ in service.requests]
    assert "rank 1 has not entered all_reduce 812 of tp" in out
    assert "look at rank 1 on 192.0.2.2, pid 23685 (confidence: high)" in out
    assert "forward_backward (microbatch 2)" in out
    assert "all_reduce 812 of tp" in out
    assert "12.0 s" in out
    assert "does not answer" in out
    assert "stack of rank 1, innermost first\n  IndexedCorpus.read" in out


def test_the_newest_is_printed_without_a_request_and_as_json(
    run: Run, service: FakeService, diagnosis: dict[str, Any]
) -> None:
    service.routes[f"GET {PATH}"] = (200, diagnosis)
    code, out, _ = run("diagnose", "job-abc", "--newest", "--json", "--url", service.url)
    assert code == 0
    assert json.loads(out) == diagnosis
    assert [request for request, _ in service.requests] == [f"GET {PATH}"]


def test_a_diagnosis_that_does_not_come_is_an_error(
    run: Run, service: FakeService, quick: None
) -> None:
    service.routes[f"POST {PATH}"] = (202, JOB)
    service.routes[f"GET {PATH}"] = (404, NONE_YET)
    arguments = ("diagnose", "job-abc", "--timeout", "1", "--url", service.url)
    code, _, error = run(*arguments)
    assert code == 1
    assert "no diagnosis of job-abc within 1 s; the job is running" in error
    code, _, error = run("diagnose", "job-abc", "--newest", "--url", service.url)
    assert code == 1
    assert "the job has no diagnosis" in error


def test_slow_ranks_have_a_place_in_show_and_ranks(run: Run, service: FakeService) -> None:
    rows = RESPONSES["list_ranks"]["data"]
    slow = {"ratio": 1.84, "since": "2026-11-29T10:15:30Z"}
    page = {**RESPONSES["list_ranks"], "data": [{**rows[0], "slow": slow}]}
    service.routes["GET /v1/jobs/job-abc/ranks"] = (200, page)
    _, out, _ = run("ranks", "job-abc", "--url", service.url)
    assert "1.8 times its peers, since 2026-11-29 10:15:30Z" in out
    _, out, _ = run("show", "job-abc", "--url", service.url)
    assert "slow ranks" in out
    assert "rank 0 on 192.0.2.2 (1.8 times its peers)" in out
    service.routes["GET /v1/jobs/job-abc/ranks"] = (200, RESPONSES["list_ranks"])
    _, out, _ = run("show", "job-abc", "--url", service.url)
    assert "slow ranks" not in out
