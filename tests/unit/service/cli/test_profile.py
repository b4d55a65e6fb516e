"""`megatron-ray profile`, and the parts of a step's time in `show`."""

import copy
import json
from typing import Any

import pytest

from service.api.examples import RESPONSES
from tests.support.fake_rest_service import FakeService, Run

PATH = "/v1/jobs/job-abc/profiles"


@pytest.fixture
def written() -> dict[str, Any]:
    body: dict[str, Any] = copy.deepcopy(RESPONSES["list_profiles"]["data"][0])
    return {**body, "job_id": "job-abc", "folder": "/data/profiles/p"}


@pytest.fixture
def pending(written: dict[str, Any]) -> dict[str, Any]:
    return {**written, "status": "pending", "reports": []}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.commands.ranks.profile._POLL_S", 0.01)


def page(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": list(entries), "has_more": False}


def ask(run: Run, service: FakeService, *arguments: str) -> tuple[int, str, str]:
    return run("profile", "job-abc", "--steps", "50-52", *arguments, "--url", service.url)


def test_it_waits_and_prints_the_files_and_the_operators(
    run: Run, service: FakeService, pending: dict[str, Any], written: dict[str, Any]
) -> None:
    service.routes[f"POST {PATH}"] = (202, pending)
    service.routes[f"GET {PATH}"] = (200, [page(pending), page(pending), page(written)])
    code, out, _ = ask(run, service, "--ranks", "0, 3")
    assert code == 0
    sent = [body for request, body in service.requests if request == f"POST {PATH}"]
    assert sent == [{"steps": "50-52", "ranks": [0, 3]}]
    assert "requested; the job has done 5 steps" in out
    assert "job-abc attempt 1, steps 50-52" in out
    assert "  /data/profiles/p/rank-00000.trace.json.gz\n" in out
    assert "  /data/profiles/p/rank-00000.memory.json\n" in out
    assert "rank 0, 0.791 s" in out
    (row,) = [line.split() for line in out.splitlines() if "aten::mm" in line]
    assert row == ["aten::mm", "288", "412.00", "ms", "58.0%"]


def test_as_json_it_prints_the_profile_alone(
    run: Run, service: FakeService, pending: dict[str, Any], written: dict[str, Any]
) -> None:
    service.routes[f"POST {PATH}"] = (202, pending)
    service.routes[f"GET {PATH}"] = (200, page(written))
    code, out, _ = ask(run, service, "--json")
    assert code == 0
    assert json.loads(out) == written


def test_a_rank_without_files_is_an_error_after_the_files_of_the_others(
    run: Run, service: FakeService, pending: dict[str, Any], written: dict[str, Any]
) -> None:
    written["reports"].append(
        {
            "rank": 1,
            "files": [],
            "seconds": 0,
            "operators": [],
            "problem": "it came too late",
        }
    )
    service.routes[f"POST {PATH}"] = (202, pending)
    service.routes[f"GET {PATH}"] = (200, page(written))
    code, out, error = ask(run, service, "--ranks", "0,1")
    assert code == 1
    assert "rank-00000.trace.json.gz" in out
    assert "no files of rank 1: it came too late" in error


def test_steps_that_do_not_come_in_time_are_an_error(
    run: Run, service: FakeService, pending: dict[str, Any]
) -> None:
    service.routes[f"POST {PATH}"] = (202, pending)
    service.routes[f"GET {PATH}"] = (200, page(pending))
    code, _, error = ask(run, service, "--timeout", "1")
    assert code == 1
    assert (
        "steps 50-52 of job-abc are not recorded within 1 s; the job is running and has done "
        "5 steps"
    ) in error
    assert "`megatron-ray profile job-abc` lists its files" in error


def test_what_the_service_refuses_is_printed(run: Run, service: FakeService) -> None:
    detail = "the job has done 60 steps; name later ones than 50-52"
    errors = [{"pointer": "/steps", "code": "steps_past", "detail": detail}]
    problem = {"code": "request_invalid", "detail": detail, "errors": errors}
    service.routes[f"POST {PATH}"] = (422, problem)
    code, _, error = ask(run, service)
    assert code != 0
    assert detail in error


def test_ranks_that_are_no_numbers_are_refused_before_anything_is_sent(
    run: Run, service: FakeService
) -> None:
    code, _, error = ask(run, service, "--ranks", "all")
    assert code == 2
    assert "'all' are no ranks; write them as 0,3" in error
    assert service.requests == []


def test_without_steps_it_lists_the_profiles(
    run: Run, service: FakeService, written: dict[str, Any]
) -> None:
    _, out, _ = run("profile", "job-abc", "--url", service.url)
    assert "no profiles; --steps 10-12 requests one of coming steps" in out
    service.routes[f"GET {PATH}"] = (200, page(written))
    _, out, _ = run("profile", "job-abc", "--url", service.url)
    assert "50-52" in out
    assert "/data/profiles/p" in out


def test_show_prints_where_the_time_of_the_newest_steps_goes(
    run: Run, service: FakeService
) -> None:
    _, out, _ = run("show", "job-abc", "--url", service.url)
    assert "step time" not in out
    rows = [
        {
            "step": step,
            "attempt": 1,
            "step_s": 0.2,
            "split_s": {"data": 0.001, "forward": 0.05, "backward": 0.149},
        }
        for step in (4, 5)
    ]
    service.routes["GET /v1/jobs/job-abc/metrics"] = (200, page(*rows))
    _, out, _ = run("show", "job-abc", "--url", service.url)
    assert "step time        0.2000 s  (backward 74%, forward 25%)" in out
    assert any("from_step=1" in request for request, _ in service.requests)
