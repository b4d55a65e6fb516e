"""Commands that follow a job: logs and watch."""

import json

import pytest

from tests.support.fake_rest_service import JOB, FakeService, Run, stream


def test_logs_follow_until_the_job_ends(
    run: Run, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.cli.log_reader.time.sleep", lambda seconds: None)
    pieces = [
        {"data": "one\n", "next_offset": 4},
        {"data": "", "next_offset": 4},
        {"data": "two\n", "next_offset": 8},
        {"data": "", "next_offset": 8},
    ]
    service.routes["GET /v1/jobs/job-abc/logs"] = (200, pieces)
    waiting = {**JOB, "status": "queued", "attempt": 0}
    service.routes["GET /v1/jobs/job-abc"] = (
        200,
        [waiting, JOB, {**JOB, "status": "succeeded"}],
    )
    code, out, _ = run("logs", "job-abc", "--follow", "--url", service.url)
    assert code == 0
    assert out == "one\ntwo\n"


def test_logs_go_on_with_the_next_attempt(
    run: Run, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.cli.log_reader.time.sleep", lambda seconds: None)
    pieces = [{"data": "one\n", "next_offset": 4}, {"data": "", "next_offset": 4}] * 2
    service.routes["GET /v1/jobs/job-abc/logs"] = (
        200,
        [*pieces, {"data": "again\n", "next_offset": 6}, {"data": "", "next_offset": 6}],
    )
    service.routes["GET /v1/jobs/job-abc"] = (
        200,
        [JOB, {**JOB, "attempt": 2, "status": "succeeded"}],
    )
    code, out, _ = run("logs", "job-abc", "--follow", "--url", service.url)
    assert code == 0
    assert out == "one\nagain\n"
    asked = [path.partition("?")[2] for path, _ in service.requests if "/logs" in path]
    assert asked[0] == "rank=0&attempt=1&offset=0"
    assert asked[-1].startswith("rank=0&attempt=2&")


def test_logs_of_one_attempt_tell_that_there_are_others(
    run: Run, service: FakeService
) -> None:
    pieces = [{"data": "two\n", "next_offset": 4}, {"data": "", "next_offset": 4}]
    service.routes["GET /v1/jobs/job-abc/logs"] = (200, pieces)
    service.routes["GET /v1/jobs/job-abc"] = (200, {**JOB, "attempt": 2})
    code, out, err = run("logs", "job-abc", "--url", service.url)
    assert (code, out) == (0, "two\n")
    assert err == "this is attempt 2; show an earlier one with --attempt\n"


def test_logs_of_a_rank_that_wrote_none(run: Run, service: FakeService) -> None:
    service.routes["GET /v1/jobs/job-abc/logs"] = (200, {"data": "", "next_offset": 0})
    code, _, err = run("logs", "job-abc", "--rank", "3", "--url", service.url)
    assert code == 1
    assert "rank 3 of job-abc has no log yet" in err


WATCHED = stream(
    ("state", {**JOB, "status": "running"}),
    ("metrics", {"rows": [{"step": 9, "attempt": 1, "loss": 3.5, "tokens_per_s": 2000.0}]}),
    ("checkpoint.committed", {"message": "checkpoint of step 10", "level": "info"}),
    (
        "metrics",
        {"rows": [{"step": 10, "attempt": 1, "loss": 3.25, "tokens_per_s": 2000.0}]},
    ),
    ("state", {**JOB, "status": "succeeded"}),
    ("end", {}),
)


def test_watch_prints_plain_lines_without_a_terminal(
    run: Run, service: FakeService
) -> None:
    service.routes["GET /v1/jobs/job-abc/stream"] = (200, WATCHED)
    service.routes["GET /v1/jobs/job-abc"] = (200, {**JOB, "status": "succeeded"})
    code, out, _ = run("watch", "job-abc", "--url", service.url)
    assert code == 0
    assert out.splitlines() == [
        "running",
        "step 9/10  loss 3.5000  2,000 tokens/s  ETA 0:00",
        "checkpoint of step 10",
        "step 10/10  loss 3.2500  2,000 tokens/s  ETA 0:00",
        "succeeded",
    ]


def test_watch_prints_single_ranks_with_verbose_only(
    run: Run, service: FakeService
) -> None:
    events = stream(
        ("rank.phase", {"message": "model took 0.8 s", "level": "info"}), ("end", {})
    )
    service.routes["GET /v1/jobs/job-abc/stream"] = (200, events)
    service.routes["GET /v1/jobs/job-abc"] = (200, {**JOB, "status": "succeeded"})
    assert "model took" not in run("watch", "job-abc", "--url", service.url)[1]
    assert "model took" in run("watch", "job-abc", "--verbose", "--url", service.url)[1]


def test_submit_watch_fails_with_the_job(run: Run, service: FakeService) -> None:
    failed = {**JOB, "status": "failed", "message": "rank 1 died of a signal"}
    service.routes["POST /v1/jobs"] = (201, JOB)
    service.routes["GET /v1/jobs/job-abc/stream"] = (
        200,
        stream(("state", failed), ("end", {})),
    )
    service.routes["GET /v1/jobs/job-abc"] = (200, failed)
    code, out, err = run("submit", "spec.yaml", "--watch", "--url", service.url)
    assert code == 1
    assert "submitted job-abc" in out
    assert "job-abc failed: rank 1 died of a signal" in err
    assert "megatron-ray logs job-abc" in err


def test_watch_json_is_one_event_a_line(run: Run, service: FakeService) -> None:
    service.routes["GET /v1/jobs/job-abc/stream"] = (200, WATCHED)
    service.routes["GET /v1/jobs/job-abc"] = (200, {**JOB, "status": "succeeded"})
    code, out, _ = run("watch", "job-abc", "--json", "--url", service.url)
    assert code == 0
    assert [json.loads(line)["event"] for line in out.splitlines()][-1] == "end"


def test_interrupted_watch_leaves_the_job_running(
    run: Run, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("service.client.Client.stream", interrupt)
    code, _, err = run("watch", "job-abc", "--url", service.url)
    assert code == 130
    assert "job-abc is still running" in err
    assert "megatron-ray watch job-abc" in err
    assert "megatron-ray cancel job-abc" in err


def test_several_jobs_are_watched_until_all_have_ended(
    run: Run, service: FakeService
) -> None:
    other = {**JOB, "id": "job-def", "status": "failed", "message": "rank 1 died"}
    service.routes["GET /v1/jobs/job-abc/stream"] = (200, WATCHED)
    service.routes["GET /v1/jobs/job-abc"] = (200, {**JOB, "status": "succeeded"})
    service.routes["GET /v1/jobs/job-def/stream"] = (
        200,
        stream(("state", other), ("end", {})),
    )
    service.routes["GET /v1/jobs/job-def"] = (200, other)
    ids = ("job-abc", "job-def", "job-abc")
    code, out, err = run("watch", *ids, "--url", service.url)
    assert code == 1
    assert "job-def failed: rank 1 died" in err
    assert "job-abc" not in err
    lines = out.splitlines()
    assert "job-def failed  rank 1 died" in lines
    own = [line for line in lines if line.startswith("job-abc")]
    assert own[0] == "job-abc running"
    assert own[-1] == "job-abc succeeded"
    assert "job-abc step 10/10  loss 3.2500  2,000 tokens/s  ETA 0:00" in own
    code, out, _ = run("watch", *ids, "--json", "--url", service.url)
    ended = [json.loads(line) for line in out.splitlines() if '"end"' in line]
    assert {event["job_id"] for event in ended} == {"job-abc", "job-def"}
    code, out, err = run("watch", "job-abc", "job-none", "--url", service.url)
    assert (code, out) == (1, "")
    assert "there is no /v1/jobs/job-none" in err
    code, _, err = run("watch", *[f"job-{n}" for n in range(51)], "--url", service.url)
    assert code == 2
    assert "at most 50 can be watched at once" in err
