"""What commit 196bb0a has written is read, and gone on with, by the code as it is now.

The files and how they were made: tests/golden/previous, make_fixtures.md there. They stay as that
commit wrote them; only the folder of its service (RECORDED) is replaced where a test needs it.
"""

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import BaseModel

from megatron_ray.checkpoint.directory import (
    latest_committed,
    list_checkpoints,
    read_manifest,
)
from megatron_ray.checkpoint.train_state import read_train_state, saved_model
from megatron_ray.data.prepared import PreparedData
from megatron_ray.storage.storage import open_storage
from service.settings import Settings
from service.store.metrics import KEYS
from service.store.schema import REVISION, Table
from tests.support.fake_cluster import FakeCluster, FakeControlPlane, fake_ports
from tests.support.service_tokens import tokens_file
from tests.unit.service.conftest import Driver, Running
from workers.decisions.journal_entry import Phase
from workers.driver.commit import contained_records
from workers.driver.context import JobContext
from workers.driver.journal import Journal, start_orders
from workers.driver.records.outbox import RecordLog
from workers.protocol import wire
from workers.protocol.job import JobSpec
from workers.protocol.states import JobState
from workers.rank.spool import parse_line

PREVIOUS = Path(__file__).parents[1] / "golden" / "previous"
RECORDED = "/tmp/fxd"
"""The data dir of the service that wrote the fixtures, as it stands in their paths."""

SUCCEEDED = "job-xpy3qarwymao"
FAILED = "job-ioa6ucjldg6x"
CANCELLED = "job-luvbdlao3jc4"
RUNNING = "job-bleud4rwyx4c"
QUEUED = "job-zk4w2gw7elic"
STATUS = {
    SUCCEEDED: "succeeded",
    FAILED: "failed",
    CANCELLED: "cancelled",
    RUNNING: "running",
    QUEUED: "queued",
}
FOLDERS = {SUCCEEDED: "succeeded", RUNNING: "interrupted"}
REPORTED = ("loss", "grad_norm", "lr", "num_tokens", "consumed_samples")
MESSAGES: dict[str, type[BaseModel]] = {
    "problem_message": wire.ProblemMessage,
    "node_info": wire.NodeInfo,
    "driver_status": wire.DriverStatus,
    "agent_report": wire.AgentReport,
    "check_request": wire.CheckRequest,
    "check_result": wire.CheckResult,
    "desired_job": wire.DesiredJob,
    "desired_reply": wire.DesiredReply,
    "record": wire.Record,
    "record_batch": wire.RecordBatch,
    "record_reply": wire.RecordReply,
    "cursor_reply": wire.CursorReply,
    "recorded/agent_report": wire.AgentReport,
    "recorded/desired_reply": wire.DesiredReply,
    "recorded/record_batch_of_rank": wire.RecordBatch,
    "recorded/record_batch_of_driver": wire.RecordBatch,
}
Json = dict[str, Any]


def job_dir(name: str, to: Path) -> Path:
    """A copy of a job's folder, its own paths turned to where it lies now.

    Files of checkpoints stay: their sizes are in the manifest, and no reader follows their paths.
    """
    shutil.copytree(PREVIOUS / "job_dir" / name, to)
    job_id = next((job_id for job_id, folder in FOLDERS.items() if folder == name), RUNNING)
    for path in [*to.glob("attempts/*.json"), *to.glob("driver/*.jsonl")]:
        path.write_text(path.read_text().replace(f"{RECORDED}/jobs/{job_id}", str(to)))
    return to


@pytest.fixture
def rows() -> sqlite3.Connection:
    """The database as it was written."""
    database = sqlite3.connect(":memory:")
    database.executescript((PREVIOUS / "database" / "service.sql").read_text())
    return database


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Running]:
    """A service of today over that database and the folders of its jobs."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    for job_id, name in FOLDERS.items():
        job_dir(name, data_dir / "jobs" / job_id)
    text = (PREVIOUS / "database" / "service.sql").read_text()
    database = sqlite3.connect(data_dir / "service.db")
    database.executescript(text.replace(RECORDED, str(data_dir)))
    database.close()
    tokens = tokens_file(tmp_path)
    running = Running(
        Settings(data_dir=data_dir, tokens_file=tokens, check_wait_s=0.05, ping_s=0.5)
    )
    yield running
    running.stop()


def answer(service: Running, path: str, **query: Any) -> Json:
    response = service.user.get(path, params=query)
    assert response.status_code == 200, f"{path}: {response.text}"
    body: Json = response.json()
    return body


def number(rows: sqlite3.Connection, job_id: str) -> int:
    number_of_job: int = rows.execute(
        "SELECT number FROM jobs WHERE id = ?", [job_id]
    ).fetchone()[0]
    return number_of_job


def test_the_database_is_migrated_to_the_tables_of_today(service: Running) -> None:
    engine = sa.create_engine(service.settings.url)
    inspector = sa.inspect(engine)
    for table in Table.metadata.sorted_tables:
        columns = {column["name"] for column in inspector.get_columns(table.name)}
        assert columns == set(table.columns.keys())
    with engine.connect() as connection:
        stands_at = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    engine.dispose()
    assert stands_at == REVISION


def test_every_job_is_listed_and_shown_as_it_was(
    service: Running, rows: sqlite3.Connection
) -> None:
    listed = answer(service, "/v1/jobs", **{"metadata[team]": "fixtures"})["data"]
    assert {job["id"]: job["status"] for job in listed} == STATUS
    columns = (
        "name, status_reason, message, desired, attempt, failures, priority, resolved_spec"
    )
    for job_id in STATUS:
        shown = answer(service, f"/v1/jobs/{job_id}")
        row = rows.execute(f"SELECT {columns} FROM jobs WHERE id = ?", [job_id]).fetchone()
        fields = (
            "name",
            "status_reason",
            "message",
            "desired_state",
            "attempt",
            "failures",
            "priority",
        )
        assert tuple(shown[field] for field in fields) == row[:7]
        assert shown["storage_path"] == f"{service.settings.data_dir}/jobs/{job_id}"
        resolved = JobSpec.from_mapping(json.loads(row[7]))
        assert resolved.name == shown["resolved_spec"]["name"]
    succeeded = service.job(SUCCEEDED)
    assert succeeded["progress"]["step"] == 6
    assert succeeded["progress"]["val_loss"] == pytest.approx(5.4997135400772095)
    evaluations = answer(service, f"/v1/jobs/{SUCCEEDED}/metrics", keys="val_loss")["data"]
    assert evaluations[-1]["val_loss"] == succeeded["progress"]["val_loss"]
    assert service.job(FAILED)["problem"]["reason"] == "nan_loss"


@pytest.mark.parametrize("job_id", STATUS)
def test_the_history_of_a_job_is_as_it_was(
    service: Running, rows: sqlite3.Connection, job_id: str
) -> None:
    of_job = [number(rows, job_id)]
    events = answer(service, f"/v1/jobs/{job_id}/events", limit=1000)["data"]
    shown = [
        (event["seq"], event["type"], event["level"], event["attempt"]) for event in events
    ]
    query = "SELECT seq, type, level, attempt FROM events WHERE job = ? ORDER BY seq"
    assert shown == rows.execute(query, of_job).fetchall()

    metrics = answer(service, f"/v1/jobs/{job_id}/metrics", keys=",".join(KEYS))["data"]
    losses = [
        (row["step"], row["attempt"], row["loss"], row["grad_norm"]) for row in metrics
    ]
    # Of a step that two attempts have made the last one's row is shown.
    query = "SELECT step, max(attempt), loss, grad_norm FROM metrics WHERE job = ? GROUP BY step"
    assert losses == rows.execute(query, of_job).fetchall()

    attempts = answer(service, f"/v1/jobs/{job_id}/attempts")["data"]
    states = [
        (row["attempt"], row["state"], row["reason"], row["world_size"]) for row in attempts
    ]
    query = "SELECT attempt, state, reason, world_size FROM attempts WHERE job = ? ORDER BY attempt"
    assert states == rows.execute(query, of_job).fetchall()

    checkpoints = answer(service, f"/v1/jobs/{job_id}/checkpoints")["data"]
    kept = [(row["step"], row["attempt"], row["bytes"], row["loss"]) for row in checkpoints]
    query = "SELECT step, attempt, bytes, loss FROM checkpoints"
    query += " WHERE job = ? AND deleted_at IS NULL ORDER BY step"
    assert kept == rows.execute(query, of_job).fetchall()
    for row in checkpoints:
        assert row["path"].startswith(
            f"{service.settings.data_dir}/jobs/{job_id}/checkpoints/step-"
        )


@pytest.mark.parametrize("job_id", STATUS)
def test_ranks_logs_and_stream_of_a_job_answer(service: Running, job_id: str) -> None:
    job = service.job(job_id)
    ranks = answer(service, f"/v1/jobs/{job_id}/ranks")["data"]
    assert [rank["rank"] for rank in ranks] == ([0, 1] if job["attempt"] else [])
    response = service.user.get(f"/v1/jobs/{job_id}/logs", params={"rank": 0})
    assert response.status_code == (200 if job["attempt"] else 404)
    if job_id in FOLDERS:
        log = f"logs/attempt-{job['attempt']:04d}/rank-00000.log"
        written = (PREVIOUS / "job_dir" / FOLDERS[job_id] / log).read_text()
        assert response.json()["data"] == written
    if JobState(job["status"]).is_terminal:
        stream = service.user.get(f"/v1/jobs/{job_id}/stream").text
        assert stream.count("event: end") == 1
        assert "event: metrics" in stream


def test_the_clusters_and_the_health_of_the_service_answer(service: Running) -> None:
    (cluster,) = answer(service, "/v1/cluster")["data"]
    assert [node["node_id"][:8] for node in cluster["nodes"]] == ["cef2f281"]
    assert answer(service, "/readyz")["database"] == "ok"
    counted = service.user.get("/metrics").text
    assert "megatron_ray" in counted


def test_an_ended_job_can_be_forgotten_and_a_waiting_one_cancelled(
    service: Running,
) -> None:
    assert service.user.delete(f"/v1/jobs/{SUCCEEDED}").status_code == 204
    assert service.user.get(f"/v1/jobs/{SUCCEEDED}").status_code == 404
    cancelled = service.user.post(f"/v1/jobs/{QUEUED}/cancel")
    assert cancelled.status_code == 202
    assert cancelled.json()["status"] == "cancelling"


def test_an_agent_and_a_driver_of_then_end_their_job_at_the_service_of_today(
    service: Running,
) -> None:
    recorded = PREVIOUS / "wire" / "recorded"
    content = {"Content-Type": "application/json"}
    report = (recorded / "agent_report.json").read_text()
    response = service.agent.http.post(
        "/internal/v1/agent/report", content=report, headers=content
    )
    assert response.json() == {"ok": True}, response.text

    query: dict[str, str | int] = {"cluster": "default", "after": -1, "wait_s": 0}
    reply = service.agent.http.get("/internal/v1/agent/desired", params=query).json()
    before = json.loads((recorded / "desired_reply.json").read_text())
    assert set(before) <= set(reply)
    wishes = {job["job_id"]: job for job in reply["jobs"]}
    for job in before["jobs"]:
        wish = wishes[job["job_id"]]
        assert set(job) <= set(wish)
        assert set(job["spec"]) <= set(wish["spec"])
        assert wish["desired"] == job["desired"]

    driver = Driver(service.client(wishes[RUNNING]["token"]), RUNNING)
    assert driver.cursor().json()["stored"] == {"driver": 24, "a1/r0": 14, "a2/r0": 9}
    for producer, stored in (("rank", 19), ("driver", 34)):
        batch = (recorded / f"record_batch_of_{producer}.json").read_text()
        path = f"/internal/v1/jobs/{RUNNING}/records"
        response = driver.http.post(path, content=batch, headers=content)
        assert response.status_code == 200, response.text
        assert response.json()["stored"] == stored
    job = service.job(RUNNING)
    assert (job["status"], job["status_reason"]) == ("cancelled", "user_cancelled")
    assert job["progress"]["step"] == 12
    assert job["last_checkpoint"]["step"] == 14
    attempts = answer(service, f"/v1/jobs/{RUNNING}/attempts")["data"]
    assert [attempt["state"] for attempt in attempts] == ["failed", "stopped"]


def test_a_driver_of_today_takes_over_where_the_journal_of_then_stands(
    tmp_path: Path,
) -> None:
    folder = job_dir("interrupted", tmp_path / "job")
    cluster = FakeCluster(steps=1, save_every=1)
    control_plane = FakeControlPlane({}, str(folder))
    ports = fake_ports(cluster, control_plane, str(folder))
    context = JobContext(RUNNING, str(folder), ports)
    entry = context.entry
    assert (entry.attempt, entry.epoch, entry.phase) == (2, 2, Phase.RUNNING)
    assert (entry.failures, entry.commits_at_failure, entry.last_commit) == (1, (4,), 6)
    assert entry.resumed_from == f"{folder}/checkpoints/step-00000004-a0001"
    assert context.world_size == 2
    assert context.records.last_state is JobState.RUNNING
    assert list(context.records.kept_checkpoints.values()) == [6]
    data = PreparedData.model_validate(entry.prepared)
    assert Path(data.tokenizer_path).exists()
    assert Path(f"{data.train[0].prefix}.bin").exists()
    orders = start_orders(entry, "cpu")
    assert [orders[slot].env.rank for slot in (0, 1)] == [0, 1]
    assert orders[1].attempt == 2
    assert JobSpec.from_mapping(orders[1].spec).name == "interrupted"


@pytest.mark.parametrize(
    ("name", "attempt", "ending"),
    [("succeeded", 1, "succeeded"), ("interrupted", 2, None), ("every_field", 3, "failed")],
)
def test_no_field_of_a_journal_is_lost(name: str, attempt: int, ending: str | None) -> None:
    folder = PREVIOUS / "job_dir" / name
    entry = Journal(open_storage(str(folder))).latest()
    assert entry is not None
    assert entry.attempt == attempt
    assert (entry.ending.state if entry.ending else None) == ending
    written = json.loads((folder / "attempts" / f"{attempt:04d}.json").read_text())
    assert entry.model_dump(mode="json", exclude_unset=True) == written


@pytest.mark.parametrize(
    ("name", "records", "reports"), [("succeeded", 16, 15), ("interrupted", 24, 7)]
)
def test_the_records_of_a_driver_are_read_again(
    name: str, records: int, reports: int
) -> None:
    folder = PREVIOUS / "job_dir" / name
    log = RecordLog(open_storage(str(folder))).load()
    assert [record.n for record in log] == list(range(1, records + 1))
    contained = contained_records(str(folder))
    (lines,) = contained.values()
    assert lines[-1].n == reports
    newest = latest_committed(str(folder))
    assert newest is not None
    assert (newest.step, newest.attempt) == (
        6,
        len(list(folder.glob("attempts/*.json"))) - 1,
    )


def test_the_report_files_that_ranks_left_on_their_node_are_read_whole() -> None:
    files = sorted(
        (PREVIOUS / "job_dir" / "interrupted_node").glob("attempt-*/rank-*.jsonl")
    )
    assert len(files) == 4
    for path in files:
        lines = [parse_line(text) for text in path.read_bytes().splitlines()]
        numbers = [line.n for line in lines if line is not None]
        assert len(numbers) == len(lines)
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@pytest.mark.parametrize(
    "path", sorted((PREVIOUS / "spec").glob("*.json")), ids=lambda path: path.stem
)
def test_a_resolved_spec_means_what_it_meant(path: Path) -> None:
    resolved = json.loads(path.read_text())["resolved"]
    spec = JobSpec.from_mapping(resolved)
    assert spec.model_dump(mode="json", exclude_unset=True) == resolved


def test_a_given_spec_is_filled_with_the_same_values() -> None:
    spec = json.loads((PREVIOUS / "spec" / "every-field.json").read_text())
    filled = JobSpec.from_mapping(spec["given"]).model_dump(mode="json")
    assert known_then(filled, spec["resolved"]) == spec["resolved"]


def known_then(filled: Any, resolved: Any) -> Any:
    """A spec without the fields that have been added since."""
    if isinstance(resolved, dict):
        return {name: known_then(filled[name], resolved[name]) for name in resolved}
    if isinstance(resolved, list):
        pairs = zip(filled, resolved, strict=True)
        return [known_then(value, then) for value, then in pairs]
    return filled


@pytest.mark.parametrize("name", MESSAGES)
def test_no_field_of_a_message_is_lost(name: str) -> None:
    text = (PREVIOUS / "wire" / f"{name}.json").read_text()
    message = MESSAGES[name].model_validate_json(text)
    assert message.model_dump(mode="json", exclude_unset=True) == json.loads(text)


def reports_after(path: Path, step: int) -> dict[str, float]:
    """What was reported of each later step, by kind, step and field: all but times and memory."""
    reports = dict[str, float]()
    for record in map(json.loads, path.read_text().splitlines()):
        data = record["data"]
        if record["kind"] not in ("step", "eval") or data["step"] <= step:
            continue
        values = {name: data[name] for name in REPORTED if name in data}
        values |= data.get("other_losses", {})
        for name, value in values.items():
            reports[f"{record['kind']} {data['step']} {name}"] = value
    return reports


@pytest.mark.parallel
@pytest.mark.parametrize(("name", "values"), [("tp2", 12), ("zero1", 12), ("experts", 18)])
def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(
    tmp_path: Path, name: str, values: int
) -> None:
    source = PREVIOUS / "checkpoint" / name
    shutil.copy(PREVIOUS / "checkpoint" / "corpus.txt", tmp_path)
    shutil.copy(source / "job.yaml", tmp_path)
    checkpoint = "step-00000004-a0001"
    shutil.copytree(source / checkpoint, tmp_path / "out" / "checkpoints" / checkpoint)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "workers.rank", "job.yaml"]
    command += [
        "--set",
        f"storage.path={tmp_path}/out",
        "--reports",
        "again.jsonl",
        "--resume",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    before = reports_after(source / "reports.jsonl", 4)
    again = reports_after(tmp_path / "again.jsonl", 4)
    assert len(before) == values
    # Bit for bit where the processor is the one that wrote them.
    assert again == pytest.approx(before, rel=1e-5)
    kept = [
        (info.step, info.attempt, info.committed)
        for info in list_checkpoints(f"{tmp_path}/out")
    ]
    assert kept == [(4, 1, True), (6, 2, True)]


@pytest.mark.parametrize("name", ["tp2", "zero1", "experts"])
def test_a_checkpoint_says_what_it_holds(name: str) -> None:
    path = PREVIOUS / "checkpoint" / name / "step-00000004-a0001"
    manifest = read_manifest(str(path))
    assert (manifest["step"], manifest["attempt"], manifest["world_size"]) == (4, 1, 2)
    state = read_train_state(str(path), 1)
    assert (state["step"], state["consumed_samples"]) == (4, 16)
    assert saved_model(str(path), state).vocab_size == 257
    assert JobSpec.from_mapping(manifest["spec"]).name == name
