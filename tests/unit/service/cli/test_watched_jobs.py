"""What the command line shows of a job's callbacks."""

from typing import Any

from tests.support.fake_rest_service import JOB, FakeService, Run

NAMES = [f"grad_norm/layers.{index}" for index in range(8)]


def page(*rows: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return 200, {"object": "list", "data": list(rows), "has_more": False}


def test_show_names_the_callbacks_and_where_their_numbers_are(
    run: Run, service: FakeService
) -> None:
    out = run("show", "job-abc", "--url", service.url)[1]
    assert "watched" not in out
    callbacks = {
        "optimizer": {"every_steps": 10, "by": "layer"},
        "activations": None,
        "unigram": {"every_steps": 1},
        "installed": {"growth": {"every_steps": 5}},
    }
    spec = JOB["resolved_spec"] | {"callbacks": callbacks}
    service.routes["GET /v1/jobs/job-abc"] = (200, JOB | {"resolved_spec": spec})
    out = " ".join(run("show", "job-abc", "--url", service.url)[1].split())
    assert (
        "watched optimizer every 10 steps, unigram every 1 step, growth every 5 steps; "
        "`megatron-ray metrics job-abc --keys monitors`"
    ) in out


def test_many_numbers_stand_in_a_line_each(run: Run, service: FakeService) -> None:
    numbers = {name: index / 4 for index, name in enumerate(NAMES)}
    row = {"step": 10, "attempt": 1, "monitors": numbers}
    service.routes["GET /v1/jobs/job-abc/metrics"] = page(row)
    arguments = ("metrics", "job-abc", "--keys", "monitors", "--url", service.url)
    lines = run(*arguments)[1].splitlines()
    shown = [line.strip() for line in lines if "grad_norm" in line]
    assert len(shown) == len(NAMES)
    assert shown[7].endswith("grad_norm/layers.7 1.75")


def test_a_name_that_no_step_has_is_answered_with_where_names_are(
    run: Run, service: FakeService
) -> None:
    service.routes["GET /v1/jobs/job-abc/metrics"] = page()
    arguments = ("metrics", "job-abc", "--url", service.url, "--keys")
    out = run(*arguments, "monitors/typo")[1]
    assert "no step up to 5 has monitors/typo; --keys monitors shows all numbers" in out
    assert "no step up to 5 has val_loss\n" in run(*arguments, "val_loss")[1]
