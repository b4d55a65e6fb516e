"""Every command against a scripted HTTP service: output, JSON, exit codes, and one
message for a mistake.
"""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from service.api.examples import RESPONSES
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


def test_secrets_of_an_address_are_not_repeated(run: Run) -> None:
    for url in (
        "http://u:SECRET@127.0.0.1:9",
        "http://127.0.0.1:9/?t=SECRET",
        "ftp://u:SECRET@h",
    ):
        code, _, err = run("jobs", "--url", url)
        assert code == 1
        assert "SECRET" not in err
        assert "://" in err


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


def jobs_page(*ids: str, total: int | None = None, **more: Any) -> dict[str, Any]:
    data = [{**JOB, "id": job_id, **more} for job_id in ids]
    count = len(data) if total is None else total
    page = {"object": "list", "data": data, "total": count, "has_more": count > len(data)}
    return {
        **page,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }


def test_jobs_follows_pages(run: Run, service: FakeService) -> None:
    first = jobs_page("job-abc", total=2)
    second = {**jobs_page("job-def", total=2), "has_more": False}
    service.routes["GET /v1/jobs"] = (200, [first, second, jobs_page()])
    code, out, _ = run("jobs", "--url", service.url)
    assert code == 0
    assert "job-abc" in out
    assert "job-def" in out
    assert "5/10" in out
    assert [path.partition("&status")[0] for path, _ in service.requests][:2] == [
        "GET /v1/jobs?limit=20",
        "GET /v1/jobs?limit=19&after=job-abc",
    ]
    service.routes["GET /v1/jobs"] = (200, jobs_page())
    assert "no jobs yet" in run("jobs", "--url", service.url)[1]
    assert "no job matches" in run("jobs", "--name", "x", "--url", service.url)[1]


def test_numbers_are_written_as_in_a_spec(run: Run, service: FakeService) -> None:
    service.routes["GET /v1/jobs"] = (200, jobs_page())
    assert run("jobs", "--limit", "1e0", "--url", service.url)[0] == 0
    assert "limit=1&" in service.requests[0][0]
    for value, words in [
        ("1.5", "'1.5' is no whole number; write it as"),
        ("0", "below 1"),
    ]:
        code, _, err = run("jobs", "--limit", value, "--url", service.url)
        assert code == 2
        assert words in err


def test_jobs_that_run_come_first_and_a_last_line_counts_the_others(
    run: Run, service: FakeService
) -> None:
    running = jobs_page("job-old")
    queued = jobs_page("job-q3", "job-q2", total=20, status="queued")
    ended = jobs_page("job-end", total=4, status="failed")
    service.routes["GET /v1/jobs"] = (200, [running, queued, ended])
    code, out, _ = run("jobs", "--limit", "3", "--url", service.url)
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["job-old", "job-q3", "job-q2"]
    assert lines[4] == "22 more; show all 25 with --limit 25"
    states = [path.partition("status=")[2].split("%2C") for path, _ in service.requests]
    assert "running" in states[0]
    assert "queued" in states[1]
    assert "succeeded" in states[2]
    service.routes["GET /v1/jobs"] = (200, [running, queued, ended])
    page = json.loads(run("jobs", "--limit", "3", "--json", "--url", service.url)[1])
    assert (page["total"], page["has_more"], len(page["data"])) == (25, True, 3)


def test_jobs_are_chosen_by_state_name_and_label(run: Run, service: FakeService) -> None:
    service.routes["GET /v1/jobs"] = (200, jobs_page("job-abc"))
    options = ("--status", "queued,running", "--name", "n*", "--metadata", "sweep=lr")
    assert run("jobs", *options, "--url", service.url)[0] == 0
    queries = [unquote(path) for path, _ in service.requests]
    assert queries == [
        "GET /v1/jobs?limit=20&status=running&name=n*&metadata[sweep]=lr",
        "GET /v1/jobs?limit=19&status=queued&name=n*&metadata[sweep]=lr",
    ]
    code, _, err = run("jobs", "--status", "sleepy", "--url", service.url)
    assert code == 2
    assert "'sleepy': no such state" in err
    assert "choose among preparing, queued" in err
    code, _, err = run("jobs", "--metadata", "sweep", "--url", service.url)
    assert (code, "expected label=value" in err) == (2, True)


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


def test_parts_that_no_step_has_are_named(run: Run, service: FakeService) -> None:
    names = ("loss", "val_loss/[en]", "val_loss/typo", "split_s/typo")
    row = dict.fromkeys(names) | {"step": 3, "attempt": 1, "val_loss/[en]": 2.5}
    page = {"object": "list", "data": [row], "has_more": False}
    service.routes["GET /v1/jobs/job-abc/metrics"] = (200, page)
    arguments = ("metrics", "job-abc", "--keys", ",".join(names), "--url", service.url)
    code, out, _ = run(*arguments)
    assert code == 0
    assert "val_loss/[en]" in out
    assert "no step has val_loss/typo; megatron-ray show JOB names the sources" in out
    assert "no step has split_s/typo; --keys split_s shows the parts" in out
    assert "no step has val_loss/[en]" not in out
    assert "no step has" not in run(*arguments, "--json")[1]


def cancellation(*cancelled: str, **more: Any) -> tuple[int, dict[str, Any]]:
    jobs = [{"id": job_id, "name": "n", "status": "cancelling"} for job_id in cancelled]
    body = {"cancelled": jobs, "ended": [], "not_found": [], "has_more": False}
    return 202, {"object": "job.cancellation", **body, **more}


def test_cancel_waits_for_the_end(run: Run, service: FakeService) -> None:
    service.routes["POST /v1/jobs:cancel"] = cancellation("job-abc")
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
    ended = [{"id": "job-abc", "name": "n", "status": "succeeded"}]
    service.routes["POST /v1/jobs:cancel"] = cancellation(ended=ended)
    code, out, err = run("cancel", "job-abc", "--url", service.url)
    assert code == 1
    assert "job-abc had ended before: succeeded" in out
    assert "job-abc succeeded before it could be cancelled" in err
    service.routes["POST /v1/jobs:cancel"] = cancellation("job-abc")
    code, _, err = run("cancel", "job-abc", "--timeout-s", "0", "--url", service.url)
    assert code == 1
    assert "still cancelling after 0 s" in err


def test_several_jobs_are_cancelled_in_one_request(run: Run, service: FakeService) -> None:
    service.routes["POST /v1/jobs:cancel"] = cancellation("job-a", "job-b", not_found=["x"])
    ids = ("job-a", "job-b", "x", "job-a")
    code, out, err = run("cancel", *ids, "--no-wait", "--url", service.url)
    assert service.requests == [("POST /v1/jobs:cancel", {"ids": ["job-a", "job-b", "x"]})]
    assert out.splitlines() == ["job-a cancelling", "job-b cancelling"]
    assert code == 1
    assert "no job 'x'" in err
    assert "megatron-ray jobs" in err


def test_chosen_jobs_are_counted_and_confirmed(
    run: Run, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = jobs_page("job-a", "job-b", status="queued")
    service.routes["GET /v1/jobs"] = (200, queued)
    service.routes["POST /v1/jobs:cancel"] = cancellation("job-a", "job-b")
    chosen = ("cancel", "--metadata", "sweep=lr", "--no-wait", "--url", service.url)
    code, _, err = run(*chosen)
    assert code == 2
    assert "2 jobs (2 queued) would be cancelled; nothing was done" in err
    assert "--yes" in err
    assert not [path for path, _ in service.requests if path.startswith("POST")]
    query = unquote(service.requests[0][0])
    assert "metadata[sweep]=lr" in query
    assert "succeeded" not in query
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer, expected in (("n\n", 1), ("y\n", 0)):
        monkeypatch.setattr(
            "typer.confirm", lambda text, *, err, answer=answer: err and answer == "y\n"
        )
        assert run(*chosen)[0] == expected
    assert service.requests[-1] == ("POST /v1/jobs:cancel", {"ids": ["job-a", "job-b"]})
    assert run(*chosen, "--yes")[0] == 0
    service.routes["GET /v1/jobs"] = (200, jobs_page())
    code, out, _ = run(*chosen)
    assert (code, out) == (0, "no job that has not ended matches\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "cancel needs job ids, or a choice"),
        (["job-a", "--status", "queued"], "cancel needs job ids, or a choice"),
        (["--status", "failed"], "jobs that have failed cannot be cancelled"),
        (["--status", "cancelled"], "jobs that have been cancelled cannot be cancelled"),
    ],
)
def test_unclear_cancellations_end_nothing(
    run: Run, service: FakeService, options: list[str], message: str
) -> None:
    code, _, err = run("cancel", *options, "--url", service.url)
    assert code == 2
    assert message in err
    assert service.requests == []


def test_checkpoint_now_waits_for_the_commit(run: Run, service: FakeService) -> None:
    service.routes["POST /v1/jobs/job-abc/checkpoint"] = (202, JOB)
    before = {"object": "list", "data": [], "last_id": "job-abc.7", "has_more": False}
    committed = {**before, "data": [{"type": "checkpoint.committed"}]}
    service.routes["GET /v1/jobs/job-abc/events"] = (200, [before, before, committed])
    code, out, _ = run("checkpoint-now", "job-abc", "--url", service.url)
    assert code == 0
    assert out.startswith("checkpoint of step 5 committed: /data/jobs/job-abc")
    assert "after=job-abc.7" in service.requests[-2][0]
    service.routes["GET /v1/jobs/job-abc"] = (200, {**JOB, "status": "failed"})
    service.routes["GET /v1/jobs/job-abc/events"] = (200, before)
    code, _, err = run("checkpoint-now", "job-abc", "--url", service.url)
    assert code == 1
    assert "job-abc failed before a checkpoint was committed" in err


def test_delete_asks_and_names_what_it_could_not_delete(
    run: Run, service: FakeService
) -> None:
    service.routes["DELETE /v1/jobs/job-abc"] = (204, {})
    code, _, err = run("delete", "job-abc", "--url", service.url)
    assert (code, "nothing was deleted" in err, service.requests) == (2, True, [])
    assert run("delete", "job-abc", "--json", "--url", service.url)[0] == 2
    assert service.requests == []
    code, out, err = run("delete", "job-abc", "job-x", "--yes", "--url", service.url)
    assert code == 1
    assert out == "job-abc deleted; its files stay\n"
    assert "job-x: there is no /v1/jobs/job-x" in err


def test_attempts_and_clusters_are_listed(run: Run, service: FakeService) -> None:
    attempt = {"attempt": 1, "state": "failed", "reason": "oom", "message": "out of memory"}
    attempt |= {"world_size": 2, "started_at": "2026-11-21T03:10:00Z", "ended_at": None}
    service.routes["GET /v1/jobs/job-abc/attempts"] = (200, {"data": [attempt]})
    code, out, _ = run("attempts", "job-abc", "--url", service.url)
    assert code == 0
    expected = [
        "1",
        "failed",
        "oom",
        "2",
        "2026-11-21",
        "03:10:00Z",
        "-",
        "out",
        "of",
        "memory",
    ]
    assert out.splitlines()[1].split() == expected
    cluster = RESPONSES["list_clusters"]
    service.routes["GET /v1/cluster"] = (200, cluster)
    code, out, _ = run("cluster", "--url", service.url)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "default  agent connected, Ray 2.60.0, jobs with a driver: 1"
    assert lines[2].split() == ["192.0.2.2", "excluded", "2", "0", "-", "8.0", "GiB"]
    assert lines[3].startswith("  192.0.2.2 (2f1d6c0b8a7e) excluded for ")
    assert lines[3].endswith(
        "by job-4nkjx2s7qzta: rank 3: CUDA error: uncorrectable ECC error encountered"
    )
    assert json.loads(run("cluster", "--json", "--url", service.url)[1]) == cluster


def test_a_node_is_excluded_and_included(run: Run, service: FakeService) -> None:
    path = "/v1/cluster/default/exclusions"
    service.routes[f"POST {path}"] = (200, RESPONSES["exclude_node"])
    service.routes[f"DELETE {path}/192.0.2.2"] = (200, RESPONSES["include_node"])
    arguments = ("192.0.2.2", "--reason", "a fan is broken", "--url", service.url)
    code, out, _ = run("cluster", "exclude", *arguments)
    assert code == 0
    assert service.requests[-1][1] == {"node": "192.0.2.2", "reason": "a fan is broken"}
    assert "192.0.2.2 (2f1d6c0b8a7e) excluded for" in out
    code, out, _ = run("cluster", "include", "192.0.2.2", "--url", service.url)
    assert code == 0
    assert "excluded for" not in out
    answer = run("cluster", "include", "192.0.2.2", "--json", "--url", service.url)[1]
    assert json.loads(answer) == RESPONSES["include_node"]


ENDED = {**JOB, "status": "succeeded", "progress": {"step": 20, "steps": 20}}
NEVER_RAN = {**JOB, "status": "cancelled", "progress": {"step": None, "steps": 20}}
NOTHING: dict[str, Any] = {"object": "list", "data": [], "has_more": False, "total": 0}


@pytest.mark.parametrize(
    ("command", "job", "line"),
    [
        (
            ["metrics", "--from-step", "1000"],
            ENDED,
            "no metrics from step 1000 on; the last step is 20",
        ),
        (["metrics"], NEVER_RAN, "no metrics; the job has ended (cancelled)"),
        (["metrics"], {**JOB, "progress": {}}, "no metrics yet; the job is running"),
        (["checkpoints"], ENDED, "no committed checkpoint; the job has ended (succeeded)"),
        (["checkpoints"], JOB, "no committed checkpoint yet; the job is running"),
        (["ranks"], NEVER_RAN, "no ranks; the job has ended (cancelled)"),
        (["attempts"], NEVER_RAN, "no attempts; the job has ended (cancelled)"),
        (["events", "--level", "error"], JOB, "no events of level error"),
    ],
)
def test_an_empty_answer_tells_why(
    run: Run, service: FakeService, command: list[str], job: dict[str, Any], line: str
) -> None:
    service.routes["GET /v1/jobs/job-abc"] = (200, job)
    service.routes[f"GET /v1/jobs/job-abc/{command[0]}"] = (200, NOTHING)
    code, out, _ = run(*command[:1], "job-abc", *command[1:], "--url", service.url)
    assert (code, out) == (0, f"{line}\n")


def test_a_shortened_answer_tells_so(run: Run, service: FakeService) -> None:
    row = {"step": 9, "attempt": 1, "loss": 1.0}
    page = {"object": "list", "data": [row], "has_more": False, "total": 10}
    service.routes["GET /v1/jobs/job-abc/metrics"] = (200, page)
    out = run("metrics", "job-abc", "--max-points", "2", "--url", service.url)[1]
    assert out.splitlines()[-1] == "1 of 10 steps; show all without --max-points"
    service.routes["GET /v1/jobs/job-abc/metrics"] = (200, {**page, "has_more": True})
    out = run("metrics", "job-abc", "--url", service.url)[1]
    assert out.splitlines()[-1] == "more steps follow; show them with --from-step 10"
    event = {"id": "job-abc.1", "seq": 1, "created_at": "T", "type": "a.b", "level": "warn"}
    event |= {"attempt": 1, "message": "slow disk"}
    page = {"object": "list", "data": [event], "has_more": True, "total": 7}
    service.routes["GET /v1/jobs/job-abc/events"] = (200, page)
    out = run("events", "job-abc", "--limit", "1", "--url", service.url)[1]
    assert out.splitlines()[-1] == "6 newer events; show all 7 with --limit 7"
    out = run("show", "job-abc", "--url", service.url)[1]
    assert out.splitlines()[-1].startswith(
        "1 of 7; show all with `megatron-ray events job-abc"
    )


@pytest.mark.parametrize(
    ("pointer", "remedy"),
    [
        ("/path/job_id", "`megatron-ray jobs` lists all jobs"),
        ("/query/rank", "choose one of these with --rank"),
        ("/query/attempt", "`megatron-ray attempts JOB` lists them"),
    ],
)
def test_what_does_not_exist_has_a_remedy_of_its_own(
    run: Run, service: FakeService, pointer: str, remedy: str
) -> None:
    error = {"pointer": pointer, "code": "x", "detail": "no rank 7; there are 2"}
    body = {"code": "not_found", "title": "Not found", "detail": error["detail"]}
    service.routes["GET /v1/jobs/job-abc/logs"] = (404, {**body, "errors": [error]})
    code, _, err = run("logs", "job-abc", "--rank", "7", "--url", service.url)
    assert code == 1
    assert err.splitlines() == ["error: no rank 7; there are 2", f"  -> {remedy}"]


@pytest.mark.parametrize(
    ("states", "job", "used"),
    [
        (["failed"], {"status": "failed", "failures": 1}, "0 of 3"),
        (["failed"] * 4, {"status": "failed", "failures": 4}, "3 of 3"),
        (["failed", "running"], {"status": "running", "failures": 1}, "1 of 3"),
        (["failed", "running"], {"status": "running", "failures": 0}, "0 of 3"),  # resumed
    ],
)
def test_restarts_used_are_those_that_were_made(
    run: Run, service: FakeService, states: list[str], job: dict[str, Any], used: str
) -> None:
    budget = {**JOB["resolved_spec"], "restart": {"max_failures": 3}}
    service.routes["GET /v1/jobs/job-abc"] = (200, {**JOB, "resolved_spec": budget, **job})
    attempts = []
    for number, state in enumerate(states, 1):
        attempts.append({"attempt": number, "state": state, "reason": "worker_died"})
    service.routes["GET /v1/jobs/job-abc/attempts"] = (200, {"data": attempts})
    out = run("show", "job-abc", "--url", service.url)[1]
    assert re.search(r"restarts used +(.*)", out)[1] == used  # type: ignore[index]
