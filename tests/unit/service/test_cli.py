"""Every command against a scripted HTTP service: output, JSON, exit codes, and the one message that a mistake is worth."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from service.cli import generate as generate_module
from service.cli import main as main_module
from service.cli.failure import Failure

SPEC = """
name: tiny
model: {preset: gpt-tiny}
data: {train: [{path: corpus.txt}], tokenizer: {kind: bytes}}
training: {seq_length: 64, global_batch_size: 4, steps: 10}
optimizer: {lr: 0.001}
"""
JOB: dict[str, Any] = {
    "object": "job",
    "id": "job-abc",
    "name": "tiny",
    "status": "running",
    "status_reason": None,
    "message": "",
    "created_at": "2026-11-20T20:00:00+00:00",
    "attempt": 1,
    "failures": 0,
    "progress": {"step": 5, "steps": 10, "loss": 3.25, "tokens_per_s": 1000.0, "eta_s": 12, "val_loss": None},
    "storage_path": "/data/jobs/job-abc",
    "last_checkpoint": {"step": 5, "path": "/data/jobs/job-abc/checkpoints/step-00000005-a0001"},
    "problem": None,
    "resolved_spec": {"training": {"steps": 10, "global_batch_size": 4, "seq_length": 64}},
}


class FakeService:
    """Routes `METHOD /path` to (status, body); a list of bodies is given out in turn, the last one repeats."""

    def __init__(self) -> None:
        self.routes: dict[str, tuple[int, Any]] = {}
        self.requests: list[tuple[str, Any]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                sent = self.rfile.read(length)
                fake.requests.append((f"{self.command} {self.path}", json.loads(sent) if sent else None))
                missing = (404, {"code": "not_found", "detail": f"there is no {self.path}"})
                status, body = fake.routes.get(f"{self.command} {self.path.partition('?')[0]}", missing)
                if isinstance(body, list):
                    body = body.pop(0) if len(body) > 1 else body[0]
                payload = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/event-stream" if isinstance(body, str) else "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            do_GET = do_POST = _answer

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def running_service() -> Iterator[FakeService]:
    fake = FakeService()
    yield fake
    fake.close()


@pytest.fixture
def service(running_service: FakeService) -> FakeService:
    running_service.routes.clear()
    running_service.requests.clear()
    running_service.routes["GET /v1/jobs/job-abc"] = (200, JOB)
    for listed in ("attempts", "events"):
        running_service.routes[f"GET /v1/jobs/job-abc/{listed}"] = (200, {"object": "list", "data": [], "has_more": False})
    return running_service


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRON_RAY_DATA_DIR", str(tmp_path / "nothing-here"))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "spec.yaml").write_text(SPEC)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["megatron-ray", *arguments])
        with pytest.raises(SystemExit) as ended:
            main_module.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def stream(*events: tuple[str, Any]) -> str:
    return "".join(f"event: {name}\nid: {index}.0\ndata: {json.dumps(data)}\n\n" for index, (name, data) in enumerate(events, 1))


def test_submit_sends_the_spec_with_overrides_and_absolute_paths(run: Run, service: FakeService, tmp_path: Path) -> None:
    service.routes["POST /v1/jobs"] = (201, JOB)
    overrides = ("--set", "training.steps=20", "--set", "parallel.tp=2", "--set", "checkpoint.start_from=models/llama")
    code, out, _ = run("submit", "spec.yaml", *overrides, "--url", service.url)
    assert code == 0 and "job-abc" in out
    sent = service.requests[0][1]
    assert sent["training"]["steps"] == 20 and sent["parallel"] == {"tp": 2}
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
    assert sent["data"]["train"][0]["path"] == "builtin://python-stdlib" and sent["storage"]["path"] == "s3://b/x"


def test_refused_spec_names_field_and_remedy(run: Run, service: FakeService) -> None:
    problem = {
        "title": "The job spec cannot be run as it is",
        "detail": "/parallel/tp: tp=3 does not divide 4; use a tp that does",
        "code": "spec_invalid",
        "status": 422,
        "errors": [{"pointer": "/parallel/tp", "code": "tp_divides", "detail": "tp=3 does not divide 4; use a tp that does"}],
    }
    service.routes["POST /v1/jobs"] = (422, problem)
    code, out, err = run("submit", "spec.yaml", "--url", service.url)
    assert code == 1 and out == ""
    assert err.splitlines() == ["error: The job spec cannot be run as it is", "  /parallel/tp: tp=3 does not divide 4; use a tp that does"]
    code, out, err = run("submit", "spec.yaml", "--url", service.url, "--json")
    assert code == 1 and out == "" and json.loads(err) == problem


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "cannot read the job spec missing.yaml: No such file or directory"),
        (["broken.yaml"], "broken.yaml is not valid YAML or JSON"),
        (["list.yaml"], "list.yaml holds list, expected a mapping of fields"),
        (["binary.yaml"], "binary.yaml is not text"),
        (["date.yaml"], "holds a value that JSON cannot"),
        (["spec.yaml", "--set", "training.steps"], "--set 'training.steps': expected path.to.field=value"),
        (["spec.yaml", "--set", "name.x=1"], "'name' is a value, not a group of fields"),
        (["spec.yaml", "--set", "training.steps=[1"], "--set 'training.steps=[1': the value is not valid YAML"),
        (["spec.yaml", "--set", "name=2026-11-20"], "--set holds a value that JSON cannot"),
        (["spec.yaml", "--set", "optimizer.lr=.nan"], "--set holds a value that JSON cannot"),
    ],
)
def test_unreadable_specs(run: Run, service: FakeService, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    (tmp_path / "date.yaml").write_text("name: 2026-11-20")
    code, out, err = run("submit", *arguments, "--url", service.url)
    assert code == 2 and message in err and "->" in err and out == ""
    assert service.requests == []


def test_no_service_named_and_none_up(run: Run, tmp_path: Path) -> None:
    code, _, err = run("jobs")
    assert code == 1
    assert f"no local stack is up (data dir {tmp_path}/nothing-here)" in err and "megatron-ray up" in err


def test_unreachable_service_says_what_to_do(run: Run) -> None:
    code, _, err = run("jobs", "--url", "http://127.0.0.1:9")
    assert code == 1 and "no service answers at http://127.0.0.1:9" in err and "megatron-ray up" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jobs", "--url", "localhost:1"], "--url localhost:1: not an address"),
        (["jobs", "--token", "@no-such-file"], "--token @no-such-file: No such file or directory"),
    ],
)
def test_wrong_connection_options(run: Run, arguments: list[str], message: str) -> None:
    code, _, err = run(*arguments)
    assert code == 1 and message in err and "->" in err


def test_wrong_token_names_the_remedy(run: Run, service: FakeService) -> None:
    service.routes["GET /v1/jobs"] = (401, {"code": "unauthorized", "status": 401, "detail": "wrong token"})
    code, _, err = run("jobs", "--url", service.url, "--token", "x")
    assert code == 1 and "wrong token" in err and "--token" in err


def test_unreadable_stack_record(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "nothing-here"
    folder.mkdir()
    (folder / "stack.json").write_text("{}")
    code, _, err = run("jobs")
    assert code == 1 and "written by another version" in err
    code, _, err = run("down")
    assert code == 1 and "written by another version" in err


def test_wrong_variable_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_RAY_PORT", "many")
    code, _, err = run("jobs")
    assert code == 1 and "MEGATRON_RAY_PORT" in err


def test_jobs_follows_pages(run: Run, service: FakeService) -> None:
    first = {"object": "list", "data": [JOB], "first_id": "job-abc", "last_id": "job-abc", "has_more": True}
    second = {"object": "list", "data": [{**JOB, "id": "job-def"}], "last_id": "job-def", "has_more": False}
    service.routes["GET /v1/jobs"] = (200, [first, second])
    code, out, _ = run("jobs", "--url", service.url)
    assert code == 0 and "job-abc" in out and "job-def" in out and "5/10" in out
    assert [path for path, _ in service.requests] == ["GET /v1/jobs?limit=20", "GET /v1/jobs?limit=19&after=job-abc"]
    service.routes["GET /v1/jobs"] = (200, {"data": [], "has_more": False})
    assert "no jobs yet" in run("jobs", "--url", service.url)[1]


def test_show_and_its_json(run: Run, service: FakeService) -> None:
    code, out, _ = run("show", "job-abc", "--url", service.url)
    assert code == 0 and "running" in out and "5/10" in out and "step-00000005-a0001" in out
    assert json.loads(run("show", "job-abc", "--url", service.url, "--json")[1]) == JOB
    code, _, err = run("show", "job-none", "--url", service.url)
    assert code == 1 and "there is no /v1/jobs/job-none" in err and "megatron-ray jobs" in err


def test_show_tells_cause_budget_attempt_and_recovery(run: Run, service: FakeService) -> None:
    budget = {**JOB["resolved_spec"], "restart": {"max_failures": 3}}
    service.routes["GET /v1/jobs/job-abc"] = (200, {**JOB, "attempt": 2, "failures": 1, "preemptions": 2, "resolved_spec": budget})
    first = {"attempt": 1, "state": "failed", "reason": "worker_died", "message": "rank 1: killed by signal 9 (SIGKILL)"}
    first |= {"started_at": "2026-11-21T03:10:00Z", "ended_at": "2026-11-21T03:12:05.123456Z"}
    second = {"attempt": 2, "state": "running", "reason": None, "message": "", "started_at": "2026-11-21T03:12:06Z", "ended_at": None}
    service.routes["GET /v1/jobs/job-abc/attempts"] = (200, {"object": "list", "data": [first, second], "has_more": False})
    text = "steps go on at 121 (attempt 2), 3.3 s after the failure was noticed: rebuild 1.9 s, load 0.1 s, recompute 1.3 s"
    recovered = {"seq": 9, "created_at": "2026-11-21T03:12:08Z", "attempt": 2, "level": "info", "type": "job.recovered", "message": text}
    started = {"seq": 8, "created_at": "T", "attempt": 2, "level": "info", "type": "attempt.started", "message": "from step 100"}
    trouble = {
        "seq": 7,
        "created_at": "2026-11-21T03:12:05Z",
        "attempt": 1,
        "level": "error",
        "type": "attempt.failed",
        "message": "rank [1]",
    }
    pages = [{"object": "list", "data": [event], "has_more": False} for event in (started, recovered, trouble)]
    service.routes["GET /v1/jobs/job-abc/events"] = (200, pages)
    code, out, _ = run("show", "job-abc", "--url", service.url)
    lines = {line[2:18].strip(): line[19:].strip() for line in out.splitlines() if line.startswith("  ")}
    assert code == 0 and lines["attempt"] == "2 running from step 100, since 2026-11-21 03:12:06Z"
    assert lines["restarts"] == "1 of 3 failures spent, 2 preemptions"
    assert lines["last failure"] == "2026-11-21 03:12:05Z  attempt 1: rank 1: killed by signal 9 (SIGKILL) (worker_died)"
    assert lines["last recovery"] == f"2026-11-21 03:12:08Z  {text}"
    assert lines["last checkpoint"].startswith("step 5  /data")
    table = out[out.index("newest warnings and errors") :].splitlines()
    assert table[2].split() == ["7", "2026-11-21", "03:12:05Z", "1", "error", "attempt.failed", "rank", "[1]"]


@pytest.mark.parametrize(
    ("command", "entry", "words"),
    [
        (
            "events",
            {"seq": 1, "id": "ev-1", "created_at": "T", "type": "job.created", "message": "made [by] hand"},
            ["job.created", "made [by] hand"],
        ),
        ("metrics", {"step": 3, "attempt": 1, "loss": 2.5, "grad_norm": None}, ["3", "2.5"]),
        ("checkpoints", {"step": 5, "attempt": 1, "loss": 2.5, "bytes": 3 << 20, "path": "/x/step-5"}, ["3.0 MiB", "/x/step-5"]),
        (
            "ranks",
            {"rank": 0, "slot": 1, "address": "10.0.0.1", "gpu": None, "pid": 7, "coordinates": {"tp": 0, "dp": 1}},
            ["10.0.0.1", "tp0 dp1"],
        ),
    ],
)
def test_listings(run: Run, service: FakeService, command: str, entry: dict[str, Any], words: list[str]) -> None:
    page = {"object": "list", "data": [entry], "has_more": False}
    service.routes[f"GET /v1/jobs/job-abc/{command}"] = (200, page)
    code, out, _ = run(command, "job-abc", "--url", service.url)
    assert code == 0 and [word for word in words if word not in out] == []
    assert json.loads(run(command, "job-abc", "--url", service.url, "--json")[1])["data"] == [entry]


def test_cancel_waits_for_the_end(run: Run, service: FakeService) -> None:
    service.routes["POST /v1/jobs/job-abc/cancel"] = (200, {**JOB, "status": "cancelling"})
    service.routes["GET /v1/jobs/job-abc"] = (200, [{**JOB, "status": "cancelling"}, {**JOB, "status": "cancelled"}])
    code, out, _ = run("cancel", "job-abc", "--url", service.url)
    assert code == 0 and "job-abc cancelled" in out
    assert run("cancel", "job-abc", "--no-wait", "--url", service.url)[0] == 0


def test_cancel_fails_when_the_job_ended_otherwise_or_not_at_all(run: Run, service: FakeService) -> None:
    service.routes["POST /v1/jobs/job-abc/cancel"] = (200, {**JOB, "status": "succeeded"})
    code, _, err = run("cancel", "job-abc", "--url", service.url)
    assert code == 1 and "had succeeded before it could be cancelled" in err
    service.routes["POST /v1/jobs/job-abc/cancel"] = (200, {**JOB, "status": "cancelling"})
    code, _, err = run("cancel", "job-abc", "--timeout-s", "0", "--url", service.url)
    assert code == 1 and "still cancelling after 0 s" in err


def test_logs_follow_until_the_job_ends(run: Run, service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.look.time.sleep", lambda seconds: None)
    pieces = [
        {"data": "one\n", "next_offset": 4},
        {"data": "", "next_offset": 4},
        {"data": "two\n", "next_offset": 8},
        {"data": "", "next_offset": 8},
    ]
    service.routes["GET /v1/jobs/job-abc/logs"] = (200, pieces)
    waiting = {**JOB, "status": "queued", "attempt": 0}
    service.routes["GET /v1/jobs/job-abc"] = (200, [waiting, JOB, {**JOB, "status": "succeeded"}])
    code, out, _ = run("logs", "job-abc", "--follow", "--url", service.url)
    assert code == 0 and out == "one\ntwo\n"


def test_logs_go_on_with_the_next_attempt(run: Run, service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.look.time.sleep", lambda seconds: None)
    pieces = [{"data": "one\n", "next_offset": 4}, {"data": "", "next_offset": 4}] * 2
    service.routes["GET /v1/jobs/job-abc/logs"] = (200, [*pieces, {"data": "again\n", "next_offset": 6}, {"data": "", "next_offset": 6}])
    service.routes["GET /v1/jobs/job-abc"] = (200, [JOB, {**JOB, "attempt": 2, "status": "succeeded"}])
    code, out, _ = run("logs", "job-abc", "--follow", "--url", service.url)
    assert code == 0 and out == "one\nagain\n"
    asked = [path.partition("?")[2] for path, _ in service.requests if "/logs" in path]
    assert asked[0] == "rank=0&attempt=1&offset=0" and asked[-1].startswith("rank=0&attempt=2&")


def test_logs_of_a_rank_that_wrote_none(run: Run, service: FakeService) -> None:
    service.routes["GET /v1/jobs/job-abc/logs"] = (200, {"data": "", "next_offset": 0})
    code, _, err = run("logs", "job-abc", "--rank", "3", "--url", service.url)
    assert code == 1 and "rank 3 of job-abc has written no log yet" in err


TIME = {"step_s": 1.5, "products_s": 0.8, "attention_s": 0.1, "memory_s": 0.3, "communication_s": 0.2, "bubble_s": 0.0} | {
    "update_s": 0.1,
    "tokens_per_s": 90000.0,
    "mfu": 0.41,
    "model_flops": 1e15,
}


@pytest.mark.parametrize("fits", [True, False])
def test_plan(run: Run, service: FakeService, fits: bool) -> None:
    answer = {
        "object": "plan",
        "resolved_spec": {"parallel": {"tp": 2, "dp": 1}},
        "world_size": 2,
        "ranks": [{"rank": 0, "island": 0, "coordinates": {"tp": 0}}],
        "memory": {"rank": 0, "parameters_bytes": 4 << 20},
        "communication": [{"axis": "tp", "kind": "all_reduce", "operations": 12, "bytes": 3 << 20}],
        "bubble_share": 0.0,
        "hardware": "H100",
        "time": TIME,
        "fits": fits,
        "problems": [] if fits else [{"pointer": "/parallel", "detail": "2 ranks, but there is room for 1; add nodes"}],
    }
    service.routes["POST /v1/plans"] = (200, answer)
    code, out, err = run("plan", "spec.yaml", "--hardware", "H100", "--url", service.url)
    assert "2 ranks" in out and "tp=2 x dp=1" in out and "4.0 MiB" in out
    assert "tp all-reduce" in out and "3.0 MiB in 12" in out and "on H100, estimated: 1.50 s" in out and "MFU 41.0 %" in out
    assert "products" in out and "800.0 ms" in out and "bubble" not in out
    assert code == (0 if fits else 1)
    assert ("/parallel: 2 ranks, but there is room for 1; add nodes" in err) is not fits
    assert service.requests[0][1]["name"] == "tiny"


def test_suggestions(run: Run, service: FakeService) -> None:
    changes = {"parallel.tp": 4, "parallel.pp": 2, "parallel.dp": 8, "training.micro_batch_size": 2}
    entry = {"changes": changes | {"training.recompute": {"granularity": "full"}}, "total_bytes_estimate": 70 << 30, "time": TIME}
    answer = {"object": "plan.suggestions", "world_size": 64, "hardware": "H100", "data": [entry], "notes": []}
    service.routes["POST /v1/plans/suggest"] = (200, answer)
    code, out, _ = run("plan", "spec.yaml", "--suggest", "--ranks", "64", "--url", service.url)
    assert code == 0 and "64 ranks of H100" in out
    assert out.splitlines()[-1].split() == ["4", "2", "1", "1", "1", "8", "2", "full", "1.50", "s", "41.0", "%", "70.0", "GiB"]
    service.routes["POST /v1/plans/suggest"] = (200, answer | {"data": [], "notes": ["no layout fits on 64 ranks"]})
    code, out, err = run("plan", "spec.yaml", "--suggest", "--url", service.url)
    assert code == 1 and "no layout fits on 64 ranks" in out and "no layout can be suggested" in err


def test_ranks_of_a_plan_are_those_of_its_degrees(run: Run, service: FakeService) -> None:
    code, _, err = run("plan", "spec.yaml", "--ranks", "64", "--url", service.url)
    assert code == 1 and "--ranks goes with --suggest" in err and service.requests == []


WATCHED = stream(
    ("state", {**JOB, "status": "running"}),
    ("metrics", {"rows": [{"step": 9, "attempt": 1, "loss": 3.5, "tokens_per_s": 2000.0}]}),
    ("checkpoint.committed", {"message": "checkpoint of step 10", "level": "info"}),
    ("metrics", {"rows": [{"step": 10, "attempt": 1, "loss": 3.25, "tokens_per_s": 2000.0}]}),
    ("state", {**JOB, "status": "succeeded"}),
    ("end", {}),
)


def test_watch_prints_plain_lines_without_a_terminal(run: Run, service: FakeService) -> None:
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


def test_submit_watch_fails_with_the_job(run: Run, service: FakeService) -> None:
    failed = {**JOB, "status": "failed", "message": "rank 1 died of a signal"}
    service.routes["POST /v1/jobs"] = (201, JOB)
    service.routes["GET /v1/jobs/job-abc/stream"] = (200, stream(("state", failed), ("end", {})))
    service.routes["GET /v1/jobs/job-abc"] = (200, failed)
    code, out, err = run("submit", "spec.yaml", "--watch", "--url", service.url)
    assert code == 1 and "submitted job-abc" in out
    assert "job-abc failed: rank 1 died of a signal" in err and "megatron-ray logs job-abc" in err


def test_watch_json_is_one_event_a_line(run: Run, service: FakeService) -> None:
    service.routes["GET /v1/jobs/job-abc/stream"] = (200, WATCHED)
    service.routes["GET /v1/jobs/job-abc"] = (200, {**JOB, "status": "succeeded"})
    code, out, _ = run("watch", "job-abc", "--json", "--url", service.url)
    assert code == 0 and [json.loads(line)["event"] for line in out.splitlines()][-1] == "end"


def test_interrupted_watch_says_that_the_job_goes_on(run: Run, service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("service.client.Client.stream", interrupt)
    code, _, err = run("watch", "job-abc", "--url", service.url)
    assert code == 130 and "job-abc goes on" in err


def test_generate_takes_the_newest_checkpoint_of_a_job(run: Run, service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, dict[str, Any]]] = []

    def generated(checkpoint: str, prompt: str, options: dict[str, Any]) -> dict[str, Any]:
        asked.append((checkpoint, prompt, options))
        return {"prompt": prompt, "text": "(self):"}

    monkeypatch.setattr(generate_module, "run_generation", generated)
    page = {"data": [{"step": 5, "attempt": 1, "path": "/old"}, {"step": 10, "attempt": 2, "path": "/new"}]}
    service.routes["GET /v1/jobs/job-abc/checkpoints"] = (200, page)
    code, out, _ = run("generate", "job-abc", "--prompt", "def f", "--seed", "7", "--url", service.url)
    assert code == 0 and out == "def f(self):\n"
    assert asked[0][:2] == ("/new", "def f") and asked[0][2]["--seed"] == 7
    service.routes["GET /v1/jobs/job-abc/checkpoints"] = (200, {"data": []})
    assert "no committed checkpoint yet" in run("generate", "job-abc", "--url", service.url)[2]


def test_generation_that_fails_gives_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module, "_MODULE", "service.no_such_module")
    with pytest.raises(Failure, match="No module named service.no_such_module"):
        generate_module.run_generation("/x", "", {})


def test_convert_gives_back_what_it_took(run: Run, service: FakeService, tmp_path: Path) -> None:
    from tests.unit.megatron_ray.checkpoint.hf_folders import publish  # takes seconds that no other test here needs

    publish("llama", tmp_path / "hf")
    code, out, err = run("convert", "import", "hf", "ours")
    assert code == 0 and "wrote ours: 21 tensors of llama" in out and "megatron-ray submit ours/spec.yaml" in out, err
    service.routes["GET /v1/jobs/job-abc/checkpoints"] = (200, {"data": [{"step": 5, "attempt": 1, "path": str(tmp_path / "ours")}]})
    code, out, err = run(
        "convert", "export", "job-abc", "again", "--dtype", "bf16", "--max-shard-size", "0.02MB", "--json", "--url", service.url
    )
    assert code == 0 and len(json.loads(out)["files"]) > 1, err
    code, out, _ = run("convert", "import", "hf", "ours", "--json")
    assert code == 1 and out == ""
    assert "it is there already" in run("convert", "import", "hf", "ours")[2]
    assert run("convert", "export", "ours", "x", "--dtype", "int4")[0] == 2
    assert "use a number and a unit" in run("convert", "export", "ours", "x", "--max-shard-size", "many")[2]


def test_data_prepare_checks_the_spec_here(run: Run) -> None:
    code, _, err = run("data", "prepare", "spec.yaml", "--cache", "cache", "--set", "training.stepz=1")
    assert code == 2 and "/training/stepz" in err
    code, _, err = run("data", "prepare", "spec.yaml")
    assert code == 2 and "--cache" in err
    code, _, err = run("data", "prepare", "spec.yaml", "--cache", "cache", "--json")
    assert code == 2 and json.loads(err)["errors"][0]["pointer"] == "/data/train/0/path"


def test_data_prepare(run: Run, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"document {index} " + "word " * 200 for index in range(50)))
    code, out, err = run("data", "prepare", "spec.yaml", "--cache", "cache", "--json", "--set", "data.validation_fraction=0")
    assert code == 0, err
    assert json.loads(out)["vocab_size"] >= 257


def test_down_when_nothing_is_up(run: Run) -> None:
    code, out, _ = run("down")
    assert code == 0 and "nothing is up" in out
    assert json.loads(run("down", "--json")[1])["was_up"] is False


def test_demo_without_its_spec(run: Run) -> None:
    code, _, err = run("demo", "--spec", "nowhere.yaml")
    assert code == 2 and "cannot read the job spec nowhere.yaml" in err


def test_a_data_dir_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("up", "--data-dir", "file/below")
    assert code == 1 and "cannot write to the data dir" in err and "--data-dir" in err
    code, _, err = run("up", "--detach", "--data-dir", "file/below")
    assert code == 1 and "cannot write to the data dir" in err


def test_usage_mistakes_end_with_code_2(run: Run) -> None:
    assert run("submit")[0] == 2
    assert run("nonsense")[0] == 2
    assert run("jobs", "--limit", "0")[0] == 2
