"""The whole road on one machine: the local stack as a user starts it, jobs through the
public API, things killed on the way.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.running_stack import CLI, Road, WholeJob

pytestmark = pytest.mark.ray


@pytest.fixture
def undisturbed(whole_job: WholeJob) -> list[dict[str, Any]]:
    """Loss and norm of every step of the spec when nothing disturbs it."""
    return whole_job.rows


def test_a_job_goes_the_whole_road(road: Road, whole_job: WholeJob) -> None:
    undisturbed = whole_job.rows
    assert [row["step"] for row in undisturbed] == list(range(1, 61))
    assert undisturbed[-1]["loss"] < undisturbed[0]["loss"] - 1
    job = whole_job.job
    (listed,) = [row for row in road.client.jobs()["data"] if row["id"] == job["id"]]
    assert listed["status"] == "succeeded"
    assert job["progress"]["val_loss"] < undisturbed[0]["loss"] - 1
    assert [entry["step"] for entry in road.client.checkpoints(job["id"])["data"]] in (
        [60, 40],
        [40, 60],
    )
    ranks = road.client.ranks(job["id"])["data"]
    assert [entry["rank"] for entry in ranks] == [0, 1]
    assert len({entry["pid"] for entry in ranks}) == 2
    events = road.client.events(job["id"], limit=100)["data"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    text = subprocess.run(
        [
            CLI,
            "generate",
            job["id"],
            "--prompt",
            "1 2 3",
            "--max-new-tokens",
            "20",
            "--data-dir",
            road.data_dir,
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert text.stdout.startswith("1 2 3")


def test_a_pipeline_trains_as_one_rank_does(road: Road) -> None:
    def train(**parallel: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        spec = road.spec(
            parallel={"tp": 1, "sequence_parallel": False, "dp": 1} | parallel,
            training={"steps": 8},
        )
        job = road.finish(road.client.submit(spec)["id"])
        assert job["status"] == "succeeded", job
        return road.rows(job["id"]), road.client.ranks(job["id"])["data"]

    (rows, ranks) = train(pp=2)
    (expected, alone) = train()
    assert (
        [row["step"] for row in rows]
        == [row["step"] for row in expected]
        == list(range(1, 9))
    )
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx(
            [row[key] for row in expected], rel=1e-5
        )
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.5
    assert [entry["coordinates"] for entry in ranks] == [
        {"tp": 0, "cp": 0, "dp": 0, "pp": place} for place in range(2)
    ]
    assert len({entry["pid"] for entry in ranks}) == 2
    assert len(alone) == 1


def test_torchrun_and_ray_train_give_the_drivers_losses(
    road: Road, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    spec = road.spec(training={"exit_every_steps": 6}, resources={"accelerator": "cpu"})
    (tmp_path / "job.json").write_text(json.dumps(spec))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    commands = {
        "torchrun": [*torchrun, "workers.rank"],
        "train": ["workers.ray_train", "--address", road.record.ray_address],
    }
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": road.record.ray_token}
    expected = [(row["step"], row["loss"], row["grad_norm"]) for row in undisturbed[:6]]
    running = {}
    for name, command in commands.items():
        storage = f"storage.path={tmp_path / name}"
        options = ["job.json", "--set", storage, "--reports", f"{name}.jsonl"]
        # Both at a time: each is one process for long before its ranks start.
        with (tmp_path / f"{name}.log").open("w") as log:
            running[name] = subprocess.Popen(
                [sys.executable, "-m", *command, *options],
                cwd=tmp_path,
                env={**os.environ, **token},
                stdout=log,
                stderr=log,
            )
    for name, process in running.items():
        process.wait(timeout=400)
        output = (tmp_path / f"{name}.log").read_text()
        assert "ended after step 6 by training.exit_every_steps" in output, output
        # The schedule is that of all 60 steps.
        assert step_rows(tmp_path / f"{name}.jsonl") == expected, "bit for bit"
        (checkpoint,) = (tmp_path / name / "checkpoints").iterdir()
        assert (checkpoint / "COMMITTED").exists()
    assert running["train"].returncode == 75


def step_rows(reports: Path) -> list[tuple[int, float, float]]:
    """(step, loss, norm) of each step in a file of reports."""
    rows = []
    for line in reports.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "step":
            data = record["data"]
            rows.append((data["step"], data["loss"], data["grad_norm"]))
    return rows


@pytest.mark.chaos
def test_the_service_may_die_while_a_job_trains(
    road: Road, undisturbed: list[dict[str, Any]]
) -> None:
    job_id = road.client.submit(road.spec())["id"]
    road.step(job_id, 10)
    pids = road.pids(job_id)
    before = road.service_session()
    os.kill(before.sid, signal.SIGKILL)
    job = road.finish(job_id)
    assert road.service_session() != before
    assert job["status"] == "succeeded"
    assert job["attempt"] == 1
    assert road.pids(job_id) == pids
    assert road.rows(job_id) == undisturbed


@pytest.mark.chaos
def test_a_rank_may_die(road: Road, undisturbed: list[dict[str, Any]]) -> None:
    job_id = road.client.submit(road.spec())["id"]
    road.wait(job_id, lambda job: job["last_checkpoint"] is not None)
    os.kill(road.pids(job_id)[1], signal.SIGKILL)
    job = road.finish(job_id)
    assert job["status"] == "succeeded"
    assert job["attempt"] == 2
    assert job["failures"] == 1
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in road.rows(job_id)] == [
        (row["step"], row["loss"], row["grad_norm"]) for row in undisturbed
    ]


@pytest.mark.chaos
def test_cancel_writes_a_checkpoint_and_leaves_nothing(road: Road) -> None:
    job_id = road.client.submit(road.spec(training={"steps": 5000}))["id"]
    road.step(job_id, 5)
    pids = road.pids(job_id)
    road.client.cancel(job_id)
    job = road.finish(job_id)
    assert job["status"] == "cancelled"
    assert job["status_reason"] == "user_cancelled"
    last = job["last_checkpoint"]["step"]
    assert last == road.rows(job_id)[-1]["step"]
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(
        Path(f"/proc/{pid}").exists() for pid in pids
    ):
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
    "context": (
        lambda road: road.spec(parallel={"tp": 1, "cp": 3, "sequence_parallel": False}),
        "/training/seq_length",
    ),
    "world too large": (lambda road: road.spec(parallel={"dp": 2}), "/parallel"),
    "missing data": (
        lambda road: road.spec(data={"train": [{"path": "/nowhere/at/all"}]}),
        "/data/train/0/path",
    ),
    "data too short": (
        lambda road: road.spec(data={"train": [{"path": short_file(road)}]}),
        "/data/train",
    ),
    "corrupt tokenizer": (
        lambda road: road.spec(
            data={"tokenizer": {"kind": "file", "path": bad_tokenizer(road)}}
        ),
        "/data/tokenizer/path",
    ),
    "unwritable storage": (
        lambda road: road.spec(storage={"path": unwritable(road)}),
        "/storage/path",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_at_once_by_field(road: Road, case: str) -> None:
    make, pointer = BAD[case]
    response = httpx.post(
        f"{road.record.url}/v1/jobs", json=make(road), headers=road.headers, timeout=20
    )
    assert response.status_code == 422, response.text
    assert response.headers["content-type"].startswith("application/problem+json")
    problem = response.json()
    assert {"type", "title", "status", "detail", "code", "request_id"} <= problem.keys()
    assert any(
        entry["pointer"].startswith(pointer) and entry["detail"]
        for entry in problem["errors"]
    ), problem
    assert "Traceback" not in response.text


def test_an_idempotency_key_gives_the_same_job_and_takes_no_other_body(road: Road) -> None:
    headers = road.headers | {"Idempotency-Key": "once"}
    url = f"{road.record.url}/v1/jobs"
    spec = road.spec(training={"steps": 5000})
    first = httpx.post(url, json=spec, headers=headers, timeout=20)
    again = httpx.post(url, json=spec, headers=headers, timeout=20)
    assert first.status_code == again.status_code == 201
    assert first.json()["id"] == again.json()["id"]
    other = httpx.post(url, json=road.spec(), headers=headers, timeout=20)
    assert other.status_code == 422
    assert "Idempotency-Key" in other.text
    road.client.cancel(first.json()["id"])
    assert road.finish(first.json()["id"])["status"] == "cancelled"


def test_a_wrong_token_is_refused(road: Road) -> None:
    response = httpx.get(
        f"{road.record.url}/v1/jobs", headers={"Authorization": "Bearer wrong"}
    )
    assert response.status_code == 401
    assert response.json()["code"]
