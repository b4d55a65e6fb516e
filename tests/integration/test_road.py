"""The whole road on one machine: the local stack as a user starts it, jobs through the public API, things killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import Client
from service.local_stack.record import StackRecord, read_record
from service.local_stack.sessions import Session, members

pytestmark = pytest.mark.ray

CLI = Path(sys.executable).with_name("megatron-ray")
SPEC: dict[str, Any] = {
    "name": "road",
    "model": {"preset": "gpt-tiny", "num_layers": 2, "hidden_size": 64},
    "parallel": {"tp": 2, "sequence_parallel": True},
    "training": {"seq_length": 64, "micro_batch_size": 4, "global_batch_size": 8, "steps": 60, "eval_samples": 8},
    "optimizer": {"lr": 3e-3},
    "checkpoint": {"every_steps": 20},
}


class Road:
    """A running stack and shorthands for looking at it."""

    def __init__(self, data_dir: Path, corpus: Path) -> None:
        self.data_dir, self.corpus = data_dir, corpus
        self.client = Client(self.record.url, self.record.token)

    @property
    def record(self) -> StackRecord:
        record = read_record(self.data_dir)
        assert record is not None
        return record

    def spec(self, **groups: Any) -> dict[str, Any]:
        spec = {**SPEC, "data": {"train": [{"path": str(self.corpus)}], "tokenizer": {"kind": "bytes"}}}
        for name, fields in groups.items():
            spec[name] = {**spec.get(name, {}), **fields} if isinstance(fields, dict) else fields
        return spec

    def wait(self, job_id: str, reached: Callable[[dict[str, Any]], bool], timeout_s: float = 120) -> dict[str, Any]:
        """Polls until it is so; a service that is away for a moment is no failure."""
        deadline, job = time.monotonic() + timeout_s, {}
        while time.monotonic() < deadline:
            try:
                response = httpx.get(f"{self.record.url}/v1/jobs/{job_id}", headers=self.headers, timeout=5)
                job = response.json()
                if response.status_code == 200 and reached(job):
                    return job
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not reached in {timeout_s} s: {json.dumps(job)[:2000]}")

    def finish(self, job_id: str) -> dict[str, Any]:
        return self.wait(job_id, lambda job: job["status"] in ("succeeded", "failed", "cancelled"))

    def step(self, job_id: str, step: int) -> dict[str, Any]:
        return self.wait(job_id, lambda job: ((job["progress"] or {}).get("step") or 0) >= step)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.record.token}"}

    def rows(self, job_id: str) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = self.client.metrics(job_id, keys="loss,grad_norm")["data"]
        return data

    def pids(self, job_id: str) -> list[int]:
        return [entry["pid"] for entry in self.client.ranks(job_id)["data"]]

    def service_session(self) -> Session:
        (entry,) = [entry for entry in self.record.sessions if entry.name == "service"]
        return entry.session


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    folder = tmp_path_factory.mktemp("road")
    corpus = folder / "corpus"
    corpus.mkdir()
    for index in range(60):
        (corpus / f"{index}.txt").write_text(" ".join(str(index * number % 97) for number in range(400)))
    data_dir = folder / "stack"
    subprocess.run([CLI, "up", "--detach", "--cpus", "2", "--data-dir", data_dir], check=True, timeout=180, stdout=subprocess.DEVNULL)
    sessions = []
    try:
        started = Road(data_dir, corpus)
        with started.client:
            yield started
        sessions = [entry.session for entry in started.record.sessions]
    finally:
        subprocess.run([CLI, "down", "--data-dir", data_dir], check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert members(set(sessions)) == []


@pytest.fixture(scope="module")
def undisturbed(road: Road) -> list[dict[str, Any]]:
    """Loss and norm of every step of the spec when nobody disturbs it."""
    job = road.finish(road.client.submit(road.spec())["id"])
    assert job["status"] == "succeeded", job
    return road.rows(job["id"])


def test_a_job_goes_the_whole_road(road: Road, undisturbed: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in undisturbed] == list(range(1, 61))
    assert undisturbed[-1]["loss"] < undisturbed[0]["loss"] - 1
    job = road.client.jobs(limit=1)["data"][0]
    assert job["status"] == "succeeded" and job["progress"]["val_loss"] < undisturbed[0]["loss"] - 1
    assert [entry["step"] for entry in road.client.checkpoints(job["id"])["data"]] in ([60, 40], [40, 60])
    ranks = road.client.ranks(job["id"])["data"]
    assert [entry["rank"] for entry in ranks] == [0, 1] and len({entry["pid"] for entry in ranks}) == 2
    events = road.client.events(job["id"], limit=100)["data"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    text = subprocess.run(
        [CLI, "generate", job["id"], "--prompt", "1 2 3", "--max-new-tokens", "20", "--data-dir", road.data_dir],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert text.stdout.startswith("1 2 3")


def test_the_service_may_die_while_a_job_trains(road: Road, undisturbed: list[dict[str, Any]]) -> None:
    job_id = road.client.submit(road.spec())["id"]
    road.step(job_id, 10)
    pids, before = road.pids(job_id), road.service_session()
    os.kill(before.sid, signal.SIGKILL)
    job = road.finish(job_id)
    assert road.service_session() != before
    assert job["status"] == "succeeded" and job["attempt"] == 1 and road.pids(job_id) == pids
    assert road.rows(job_id) == undisturbed


def test_a_rank_may_die(road: Road, undisturbed: list[dict[str, Any]]) -> None:
    job_id = road.client.submit(road.spec())["id"]
    road.wait(job_id, lambda job: job["last_checkpoint"] is not None)
    os.kill(road.pids(job_id)[1], signal.SIGKILL)
    job = road.finish(job_id)
    assert job["status"] == "succeeded" and job["attempt"] == 2 and job["failures"] == 1
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in road.rows(job_id)] == [
        (row["step"], row["loss"], row["grad_norm"]) for row in undisturbed
    ]


def test_cancel_writes_a_checkpoint_and_leaves_nothing(road: Road) -> None:
    job_id = road.client.submit(road.spec(training={"steps": 5000}))["id"]
    road.step(job_id, 5)
    pids = road.pids(job_id)
    road.client.cancel(job_id)
    job = road.finish(job_id)
    assert job["status"] == "cancelled" and job["status_reason"] == "user_cancelled"
    last = job["last_checkpoint"]["step"]
    assert last == road.rows(job_id)[-1]["step"]
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def short_file(road: Road) -> str:
    path = road.data_dir / "short.txt"
    path.write_text("too short")
    return str(path)


def bad_tokenizer(road: Road) -> str:
    path = road.data_dir / "broken.json"
    path.write_text("{ this is no tokenizer")
    return str(path)


def unwritable(road: Road) -> str:
    path = road.data_dir / "a-file"
    path.write_text("no folder")
    return str(path / "below")


BAD: dict[str, tuple[Callable[[Road], dict[str, Any]], str]] = {
    "unknown field": (lambda road: {**road.spec(), "learning_rate": 1}, "/learning_rate"),
    "tp that does not divide": (lambda road: road.spec(parallel={"tp": 3}), "/parallel/tp"),
    "pipeline": (lambda road: road.spec(parallel={"pp": 2}), "/parallel/pp"),
    "world too large": (lambda road: road.spec(parallel={"dp": 2}), "/parallel"),
    "missing data": (lambda road: road.spec(data={"train": [{"path": "/nowhere/at/all"}]}), "/data/train/0/path"),
    "data too short": (lambda road: road.spec(data={"train": [{"path": short_file(road)}]}), "/data/train"),
    "corrupt tokenizer": (
        lambda road: road.spec(data={"tokenizer": {"kind": "file", "path": bad_tokenizer(road)}}),
        "/data/tokenizer/path",
    ),
    "unwritable storage": (lambda road: road.spec(storage={"path": unwritable(road)}), "/storage/path"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_at_once_by_field(road: Road, case: str) -> None:
    make, pointer = BAD[case]
    response = httpx.post(f"{road.record.url}/v1/jobs", json=make(road), headers=road.headers, timeout=20)
    assert response.status_code == 422, response.text
    assert response.headers["content-type"].startswith("application/problem+json")
    problem = response.json()
    assert {"type", "title", "status", "detail", "code", "request_id"} <= problem.keys()
    assert any(entry["pointer"].startswith(pointer) and entry["detail"] for entry in problem["errors"]), problem
    assert "Traceback" not in response.text


def test_an_idempotency_key_gives_the_same_job_and_takes_no_other_body(road: Road) -> None:
    headers = road.headers | {"Idempotency-Key": "once"}
    url, spec = f"{road.record.url}/v1/jobs", road.spec(training={"steps": 5000})
    first = httpx.post(url, json=spec, headers=headers, timeout=20)
    again = httpx.post(url, json=spec, headers=headers, timeout=20)
    assert first.status_code == again.status_code == 201 and first.json()["id"] == again.json()["id"]
    other = httpx.post(url, json=road.spec(), headers=headers, timeout=20)
    assert other.status_code == 422 and "Idempotency-Key" in other.text
    road.client.cancel(first.json()["id"])
    assert road.finish(first.json()["id"])["status"] == "cancelled"


def test_a_wrong_token_is_refused(road: Road) -> None:
    response = httpx.get(f"{road.record.url}/v1/jobs", headers={"Authorization": "Bearer wrong"})
    assert response.status_code == 401 and response.json()["code"]
