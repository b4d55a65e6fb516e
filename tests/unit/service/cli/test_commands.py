"""Every command against a scripted HTTP service: output, JSON, exit codes, and one
message for a mistake.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_rest_service import JOB, FakeService, Run


def test_submit_sends_the_spec_with_overrides_and_absolute_paths(
    run: Run, service: FakeService, tmp_path: Path
) -> None:
    service.routes["POST /v1/jobs"] = (201, JOB)
    overrides = (
        "--set",
        "training.steps=20",
        "--set",
        "parallel.tp=2",
        "--set",
        "checkpoint.start_from=models/llama",
    )
    code, out, _ = run("submit", "spec.yaml", *overrides, "--url", service.url)
    assert code == 0
    assert "job-abc" in out
    sent = service.requests[0][1]
    assert sent["training"]["steps"] == 20
    assert sent["parallel"] == {"tp": 2}
    assert sent["data"]["train"][0]["path"] == str(tmp_path / "corpus.txt")
    assert sent["checkpoint"]["start_from"] == str(tmp_path / "models" / "llama")


def test_builtin_and_remote_paths_stay_as_they_are(run: Run, service: FakeService) -> None:
    service.routes["POST /v1/jobs"] = (201, JOB)
    run(
        "submit",
        "spec.yaml",
        "--set",
        "data.train=[{path: builtin://python-stdlib}]",
        "--set",
        "storage.path=s3://b/x",
        "--url",
        service.url,
    )
    sent = service.requests[0][1]
    assert sent["data"]["train"][0]["path"] == "builtin://python-stdlib"
    assert sent["storage"]["path"] == "s3://b/x"


def test_refused_spec_names_field_and_remedy(run: Run, service: FakeService) -> None:
    problem = {
        "title": "The job spec cannot be run as it is",
        "detail": "/parallel/tp: tp=3 does not divide 4; use a tp that does",
        "code": "spec_invalid",
        "status": 422,
        "errors": [
            {
                "pointer": "/parallel/tp",
                "code": "tp_divides",
                "detail": "tp=3 does not divide 4; use a tp that does",
            }
        ],
    }
    service.routes["POST /v1/jobs"] = (422, problem)
    code, out, err = run("submit", "spec.yaml", "--url", service.url)
    assert code == 1
    assert out == ""
    assert err.splitlines() == [
        "error: The job spec cannot be run as it is",
        "  /parallel/tp: tp=3 does not divide 4; use a tp that does",
    ]
    code, out, err = run("submit", "spec.yaml", "--url", service.url, "--json")
    assert code == 1
    assert out == ""
    assert json.loads(err) == problem


def test_submit_shows_what_was_noted_about_the_spec(run: Run, service: FakeService) -> None:
    service.routes["POST /v1/jobs"] = (201, JOB)
    warning = {"type": "spec.warning", "message": "/schedule/warmup_steps: too long [b]"}
    service.routes["GET /v1/jobs/job-abc/events"] = (200, {"data": [warning]})
    code, out, err = run("submit", "spec.yaml", "--url", service.url)
    assert code == 0
    assert "submitted job-abc" in out
    assert err == "warning: /schedule/warmup_steps: too long [b]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["missing.yaml"],
            "cannot read the job spec missing.yaml: No such file or directory",
        ),
        (["broken.yaml"], "broken.yaml is not valid YAML or JSON"),
        (["list.yaml"], "list.yaml holds list, expected a mapping of fields"),
        (["binary.yaml"], "binary.yaml is not text"),
        (["date.yaml"], "date.yaml has a value that JSON does not support"),
        (
            ["spec.yaml", "--set", "training.steps"],
            "--set 'training.steps': expected path.to.field=value",
        ),
        (["spec.yaml", "--set", "name.x=1"], "'name' is a value, not a group of fields"),
        (
            ["spec.yaml", "--set", "training.steps=[1"],
            "--set 'training.steps=[1': the value is not valid YAML",
        ),
        (
            ["spec.yaml", "--set", "name=!!timestamp 2026-11-20"],
            "--set has a value that JSON does not support",
        ),
        (
            ["spec.yaml", "--set", "optimizer.lr=.nan"],
            "--set has a value that JSON does not support",
        ),
    ],
)
def test_unreadable_specs(
    run: Run, service: FakeService, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    (tmp_path / "date.yaml").write_text("name: !!timestamp 2026-11-20")
    code, out, err = run("submit", *arguments, "--url", service.url)
    assert code == 2
    assert message in err
    assert "->" in err
    assert out == ""
    assert service.requests == []


def test_without_url_and_local_stack(run: Run, tmp_path: Path) -> None:
    code, _, err = run("jobs")
    assert code == 1
    assert f"no local stack is up (data dir {tmp_path}/nothing-here)" in err
    assert "megatron-ray up" in err


def test_unreachable_service_names_the_remedy(run: Run) -> None:
    code, _, err = run("jobs", "--url", "http://127.0.0.1:9")
    assert code == 1
    assert "no service answers at http://127.0.0.1:9" in err
    assert "megatron-ray up" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jobs", "--url", "localhost:1"], "--url localhost:1: not an address"),
        (
            ["jobs", "--token", "@no-such-file"],
            "--token @no-such-file: No such file or directory",
        ),
    ],
)
def test_wrong_connection_options(run: Run, arguments: list[str], message: str) -> None:
    code, _, err = run(*arguments)
    assert code == 1
    assert message in err
    assert "->" in err


def test_wrong_token_names_the_remedy(run: Run, service: FakeService) -> None:
    service.routes["GET /v1/jobs"] = (
        401,
        {"code": "unauthorized", "status": 401, "detail": "wrong token"},
    )
    code, _, err = run("jobs", "--url", service.url, "--token", "x")
    assert code == 1
    assert "wrong token" in err
    assert "--token" in err


def test_unreadable_stack_record(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "nothing-here"
    folder.mkdir()
    (folder / "stack.json").write_text("{}")
    code, _, err = run("jobs")
    assert code == 1
    assert "written by another version" in err
    code, _, err = run("down")
    assert code == 1
    assert "written by another version" in err


def test_wrong_variable_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_RAY_PORT", "many")
    code, _, err = run("jobs")
    assert code == 1
    assert "MEGATRON_RAY_PORT" in err


def test_jobs_follows_pages(run: Run, service: FakeService) -> None:
    first = {
        "object": "list",
        "data": [JOB],
        "first_id": "job-abc",
        "last_id": "job-abc",
        "has_more": True,
    }
    second = {
        "object": "list",
        "data": [{**JOB, "id": "job-def"}],
        "last_id": "job-def",
        "has_more": False,
    }
    service.routes["GET /v1/jobs"] = (200, [first, second])
    code, out, _ = run("jobs", "--url", service.url)
    assert code == 0
    assert "job-abc" in out
    assert "job-def" in out
    assert "5/10" in out
    assert [path for path, _ in service.requests] == [
        "GET /v1/jobs?limit=20",
        "GET /v1/jobs?limit=19&after=job-abc",
    ]
    service.routes["GET /v1/jobs"] = (200, {"data": [], "has_more": False})
    assert "no jobs yet" in run("jobs", "--url", service.url)[1]


def test_show_has_the_validation_loss_of_each_source(
    run: Run, service: FakeService
) -> None:
    for by_source, shown in (
        ({"en": 1.5, "de": None}, "2.5000  (en 1.5000, de -)"),
        ({"en": 2.5}, "2.5000"),
        (None, "2.5000"),
    ):
        progress = JOB["progress"] | {"val_loss": 2.5, "source_val_losses": by_source}
        service.routes["GET /v1/jobs/job-abc"] = (200, JOB | {"progress": progress})
        lines = run("show", "job-abc", "--url", service.url)[1].splitlines()
        (line,) = [line for line in lines if "validation loss" in line]
        assert line.split(maxsplit=2)[2] == shown


def test_show_and_its_json(run: Run, service: FakeService) -> None:
    code, out, _ = run("show", "job-abc", "--url", service.url)
    assert code == 0
    assert "running" in out
    assert "5/10" in out
    assert "step-00000005-a0001" in out
    assert json.loads(run("show", "job-abc", "--url", service.url, "--json")[1]) == JOB
    code, _, err = run("show", "job-none", "--url", service.url)
    assert code == 1
    assert "there is no /v1/jobs/job-none" in err
    assert "megatron-ray jobs" in err


def test_show_prints_cause_budget_attempt_and_recovery(
    run: Run, service: FakeService
) -> None:
    budget = {**JOB["resolved_spec"], "restart": {"max_failures": 3}}
    service.routes["GET /v1/jobs/job-abc"] = (
        200,
        {**JOB, "attempt": 2, "failures": 1, "preemptions": 2, "resolved_spec": budget},
    )
    first = {
        "attempt": 1,
        "state": "failed",
        "reason": "worker_died",
        "message": "rank 1: killed by signal 9 (SIGKILL)",
    }
    first |= {
        "started_at": "2026-11-21T03:10:00Z",
        "ended_at": "2026-11-21T03:12:05.123456Z",
    }
    second = {
        "attempt": 2,
        "state": "running",
        "reason": None,
        "message": "",
        "started_at": "2026-11-21T03:12:06Z",
        "ended_at": None,
    }
    service.routes["GET /v1/jobs/job-abc/attempts"] = (
        200,
        {"object": "list", "data": [first, second], "has_more": False},
    )
    text = (
        "recovered at step 121 in 3.3 s (attempt 2): rebuild 1.9 s, load 0.1 s, "
        "recompute 1.3 s"
    )
    recovered = {
        "seq": 9,
        "created_at": "2026-11-21T03:12:08Z",
        "attempt": 2,
        "level": "info",
        "type": "job.recovered",
        "message": text,
    }
    started = {
        "seq": 8,
        "created_at": "T",
        "attempt": 2,
        "level": "info",
        "type": "attempt.started",
        "message": "resumes from checkpoint step 100",
    }
    trouble = {
        "seq": 7,
        "created_at": "2026-11-21T03:12:05Z",
        "attempt": 1,
        "level": "error",
        "type": "attempt.failed",
        "message": "rank [1]",
    }
    pages = [
        {"object": "list", "data": [event], "has_more": False}
        for event in (started, recovered, trouble)
    ]
    service.routes["GET /v1/jobs/job-abc/events"] = (200, pages)
    code, out, _ = run("show", "job-abc", "--url", service.url)
    lines = {
        line[2:18].strip(): line[19:].strip()
        for line in out.splitlines()
        if line.startswith("  ")
    }
    assert code == 0
    assert (
        lines["attempt"]
        == "2 running (resumes from checkpoint step 100), since 2026-11-21 03:12:06Z"
    )
    assert lines["restarts used"] == "1 of 3, plus 2 preemptions"
    assert (
        lines["last failure"]
        == "2026-11-21 03:12:05Z  attempt 1: rank 1: killed by signal 9 (SIGKILL) (worker_died)"
    )
    assert lines["last recovery"] == f"2026-11-21 03:12:08Z  {text}"
    assert lines["last checkpoint"].startswith("step 5  /data")
    table = out[out.index("newest warnings and errors") :].splitlines()
    assert table[2].split() == [
        "7",
        "2026-11-21",
        "03:12:05Z",
        "1",
        "error",
        "attempt.failed",
        "rank",
        "[1]",
    ]


@pytest.mark.parametrize(
    ("command", "entry", "words"),
    [
        (
            "events",
            {
                "seq": 1,
                "id": "ev-1",
                "created_at": "T",
                "type": "job.created",
                "message": "made [by] hand",
            },
            ["job.created", "made [by] hand"],
        ),
        (
            "metrics",
            {"step": 3, "attempt": 1, "loss": 2.5, "grad_norm": None},
            ["3", "2.5"],
        ),
        (
            "checkpoints",
            {"step": 5, "attempt": 1, "loss": 2.5, "bytes": 3 << 20, "path": "/x/step-5"},
            ["3.0 MiB", "/x/step-5"],
        ),
        (
            "ranks",
            {
                "rank": 0,
                "slot": 1,
                "address": "10.0.0.1",
                "gpu": None,
                "pid": 7,
                "coordinates": {"tp": 0, "dp": 1},
            },
            ["10.0.0.1", "tp0 dp1"],
        ),
    ],
)
def test_listings(
    run: Run, service: FakeService, command: str, entry: dict[str, Any], words: list[str]
) -> None:
    page = {"object": "list", "data": [entry], "has_more": False}
    service.routes[f"GET /v1/jobs/job-abc/{command}"] = (200, page)
    code, out, _ = run(command, "job-abc", "--url", service.url)
    assert code == 0
    assert [word for word in words if word not in out] == []
    assert json.loads(run(command, "job-abc", "--url", service.url, "--json")[1])[
        "data"
    ] == [entry]


def test_metrics_of_several_parts_are_one_cell(run: Run, service: FakeService) -> None:
    losses = {"load_balancing_loss": 1.25, "z_loss": None}
    page = {
        "object": "list",
        "data": [{"step": 3, "attempt": 1, "other_losses": losses, "split_s": {}}],
        "has_more": False,
    }
    service.routes["GET /v1/jobs/job-abc/metrics"] = (200, page)
    code, out, _ = run(
        "metrics", "job-abc", "--keys", "other_losses,split_s", "--url", service.url
    )
    assert code == 0
    assert "load_balancing_loss 1.25, z_loss -" in out


def test_cancel_waits_for_the_end(run: Run, service: FakeService) -> None:
    service.routes["POST /v1/jobs/job-abc/cancel"] = (200, {**JOB, "status": "cancelling"})
    service.routes["GET /v1/jobs/job-abc"] = (
        200,
        [{**JOB, "status": "cancelling"}, {**JOB, "status": "cancelled"}],
    )
    code, out, _ = run("cancel", "job-abc", "--url", service.url)
    assert code == 0
    assert "job-abc cancelled" in out
    assert run("cancel", "job-abc", "--no-wait", "--url", service.url)[0] == 0


def test_cancel_fails_when_the_job_ended_otherwise_or_not_at_all(
    run: Run, service: FakeService
) -> None:
    service.routes["POST /v1/jobs/job-abc/cancel"] = (200, {**JOB, "status": "succeeded"})
    code, _, err = run("cancel", "job-abc", "--url", service.url)
    assert code == 1
    assert "job-abc succeeded before it could be cancelled" in err
    service.routes["POST /v1/jobs/job-abc/cancel"] = (200, {**JOB, "status": "cancelling"})
    code, _, err = run("cancel", "job-abc", "--timeout-s", "0", "--url", service.url)
    assert code == 1
    assert "still cancelling after 0 s" in err
