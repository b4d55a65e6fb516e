"""The road a newcomer walks, by the command line alone: up, plan, submit, look,
generate, cancel, resume, down and up again.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.local_stack.record import read_record
from service.local_stack.sessions import members

pytestmark = pytest.mark.ray

SPEC = """
name: tiny
model: {preset: gpt-tiny, num_layers: 2}
parallel: {tp: 2, dp: 1, sequence_parallel: true}
data: {train: [{path: corpus.txt}], tokenizer: {kind: bytes}, validation_fraction: 0.2}
training: {seq_length: 64, micro_batch_size: 2, global_batch_size: 4, steps: 12}
optimizer: {lr: 0.003}
checkpoint: {every_steps: 6}
"""

ONE_RANK = ("--set", "parallel.tp=1", "--set", "parallel.sequence_parallel=false")


class CommandLine:
    """`megatron-ray` in one folder, with one data dir."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_dir = folder / "data"

    def run(
        self, *arguments: str, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "service.cli.entry",
            *arguments,
            "--data-dir",
            str(self.data_dir),
        ]
        return subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=timeout_s
        )

    def ok(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    folder = tmp_path_factory.mktemp("road")
    (folder / "spec.yaml").write_text(SPEC)
    (folder / "corpus.txt").write_text(
        "\n\n".join(
            f"Document {index} says: " + "the quick brown fox. " * 20 for index in range(60)
        )
    )
    line = CommandLine(folder)
    line.ok("up", "--detach", "--cpus", "2")
    yield line
    line.run("down", "--job-grace-s", "0")


def test_the_road(cli: CommandLine) -> None:
    plan = json.loads(cli.ok("plan", "spec.yaml", "--json"))
    assert plan["world_size"] == 2
    assert plan["fits"] is True

    done = cli.run("submit", "spec.yaml", "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "running" in done.stdout
    assert "step 12/12" in done.stdout
    assert done.stdout.rstrip().endswith("succeeded")

    (job,) = json.loads(cli.ok("jobs", "--json"))["data"]
    shown = json.loads(cli.ok("show", job["id"], "--json"))
    assert shown["status"] == "succeeded"
    assert shown["progress"]["step"] == 12
    rows = json.loads(cli.ok("metrics", job["id"], "--json"))["data"]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert len(json.loads(cli.ok("ranks", job["id"], "--json"))["data"]) == 2
    assert [
        entry["step"]
        for entry in json.loads(cli.ok("checkpoints", job["id"], "--json"))["data"]
    ] == [6, 12]
    seqs = [
        event["seq"] for event in json.loads(cli.ok("events", job["id"], "--json"))["data"]
    ]
    assert seqs == list(range(1, len(seqs) + 1))
    cli.ok("logs", job["id"])
    generated = json.loads(
        cli.ok(
            "generate",
            job["id"],
            "--prompt",
            "Document",
            "--max-new-tokens",
            "20",
            "--json",
        )
    )
    assert generated["text"]


def test_cancel_ends_a_job(cli: CommandLine) -> None:
    job = json.loads(
        cli.ok("submit", "spec.yaml", *ONE_RANK, "--set", "training.steps=100000", "--json")
    )
    deadline = time.monotonic() + 60
    while json.loads(cli.ok("show", job["id"], "--json"))["status"] != "running":
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert "cancelled" in cli.ok("cancel", job["id"])
    assert "cancelled" in cli.ok("jobs")


def test_mistakes_are_one_message(cli: CommandLine) -> None:
    for override, pointer in [
        ("parallel.tp=3", "/parallel/tp"),
        ("training.stepz=1", "/training/stepz"),
        ("data.train=[{path: missing.txt}]", "/data/train/0/path"),
        ("parallel.dp=2", "/parallel: "),
    ]:
        done = cli.run("submit", "spec.yaml", "--set", override)
        assert done.returncode == 1, (override, done.stderr)
        assert pointer in done.stderr, (override, done.stderr)
        assert "Traceback" not in done.stderr, (override, done.stderr)
    assert "already up" in cli.run("up").stderr


def await_step(cli: CommandLine, job_id: str, step: int) -> None:
    deadline = time.monotonic() + 90
    while (json.loads(cli.ok("show", job_id, "--json"))["progress"]["step"] or 0) < step:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def losses(cli: CommandLine, job_id: str) -> list[tuple[int, float]]:
    rows = json.loads(cli.ok("metrics", job_id, "--json", "--max-points", "1000"))["data"]
    return [(row["step"], row["loss"]) for row in rows]


def test_a_job_that_was_cancelled_and_whose_stack_was_stopped_is_as_if_undisturbed(
    cli: CommandLine,
) -> None:
    long = (*ONE_RANK, "--set", "training.steps=400", "--set", "checkpoint.every_steps=300")
    undisturbed = json.loads(cli.ok("submit", "spec.yaml", *long, "--json"))["id"]
    cli.ok("watch", undisturbed)

    job_id = json.loads(cli.ok("submit", "spec.yaml", *long, "--json"))["id"]
    await_step(cli, job_id, 20)
    cli.ok("cancel", job_id)
    cli.ok("resume", job_id)
    await_step(cli, job_id, 60)
    record = read_record(cli.data_dir)
    assert record is not None
    output = cli.ok("down")
    assert f"paused: {job_id}; the next `up` resumes them" in output
    assert members(entry.session for entry in record.sessions) == []
    assert not Path(record.temp_dir).exists()
    assert read_record(cli.data_dir) is None
    assert "nothing is up" in cli.ok("down")

    cli.ok("up", "--detach", "--cpus", "2")
    assert cli.ok("watch", job_id).rstrip().endswith("succeeded")
    assert losses(cli, job_id) == losses(cli, undisturbed)
    attempts = json.loads(cli.ok("show", job_id, "--json"))["attempt"]
    assert attempts == 3, "one to the cancel, one to the stop, one to the end"


def test_down_cancels_jobs_when_asked_to(cli: CommandLine) -> None:
    job = json.loads(
        cli.ok("submit", "spec.yaml", *ONE_RANK, "--set", "training.steps=100000", "--json")
    )
    assert f"ended: {job['id']}" in cli.ok("down", "--cancel-jobs")
    cli.ok("up", "--detach", "--cpus", "2")
    assert json.loads(cli.ok("show", job["id"], "--json"))["status"] == "cancelled"
