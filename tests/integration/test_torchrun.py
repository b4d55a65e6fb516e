"""The same loop without Ray: torchrun, two ranks, a checkpoint, and a resume from it."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ray.checkpoint.hf.importing import import_folder
from megatron_ray.data.tokenizer import Tokenizer
from tests.support.hf_folders import publish
from workers.job_file import read_spec
from workers.rank.messages import UserError

pytestmark = pytest.mark.parallel

JOB = """
name: small
model: {preset: gpt-tiny}
data: {train: [{path: CORPUS}], tokenizer: {kind: bytes}}
training: {seq_length: 32, micro_batch_size: 1, global_batch_size: 2, steps: 6}
optimizer: {lr: 1.0e-3}
checkpoint: {every_steps: 2, keep_last: 2}
resources: {accelerator: cpu}
storage: {path: STORAGE}
"""


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def torchrun(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return run(folder, *launcher, "-m", "workers.rank", "job.yaml", *arguments)


def train_alone(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A process without torchrun is the only rank of its world."""
    return run(folder, "-m", "workers.rank", "job.yaml", *arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text(
        "the quick brown fox jumps over the lazy dog\n" * 500
    )
    job = JOB.replace("CORPUS", str(tmp_path / "corpus.txt"))
    job = job.replace("STORAGE", str(tmp_path / "out"))
    (tmp_path / "job.yaml").write_text(job)
    return tmp_path


def losses(path: Path) -> list[tuple[int, int, float]]:
    """(attempt, step, loss) of each step report."""
    rows = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "step":
            data = record["data"]
            rows.append((record["attempt"], data["step"], data["loss"]))
    return rows


def test_trains_commits_and_resumes_bit_for_bit(folder: Path) -> None:
    whole = torchrun(folder, "--set", "parallel.tp=2", "--reports", "whole.jsonl")
    assert whole.returncode == 0, whole.stderr
    assert "finished; newest checkpoint:" in whole.stdout
    checkpoints = sorted((folder / "out" / "checkpoints").iterdir())
    names = [path.name for path in checkpoints]
    assert names == ["step-00000004-a0001", "step-00000006-a0001"]
    for path in checkpoints:
        assert (path / "COMMITTED").exists()
    # Without marker and manifest the newest checkpoint is torn, so the resume starts at
    # step 4.
    for name in ("COMMITTED", "manifest.json"):
        (checkpoints[1] / name).unlink()
    resumed = torchrun(
        folder, "--set", "parallel.tp=2", "--reports", "resumed.jsonl", "--resume"
    )
    assert resumed.returncode == 0, resumed.stderr
    expected = [(2, step, loss) for _, step, loss in losses(folder / "whole.jsonl")[4:]]
    assert losses(folder / "resumed.jsonl") == expected


@pytest.mark.chaos
def test_two_agents_of_torchrun_meet_as_on_two_nodes_and_give_the_same_losses(
    folder: Path,
) -> None:
    one = torchrun(folder, "--set", "parallel.tp=2", "--reports", "one.jsonl")
    assert one.returncode == 0, one.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = []
    for node in range(2):
        options = f"--nnodes=2 --node-rank={node} --nproc-per-node=1 --master-port={port}"
        addresses = f"--master-addr=127.0.0.1 --local-addr=127.0.0.{node + 1}"
        launcher = ["torch.distributed.run", *options.split(), *addresses.split()]
        overrides = set_options(["parallel.tp=2", f"storage.path={folder / 'two'}"])
        job = ["-m", "workers.rank", "job.yaml", *overrides, "--reports", "two.jsonl"]
        agents.append(subprocess.Popen([sys.executable, "-m", *launcher, *job], cwd=folder))
    assert [agent.wait(timeout=180) for agent in agents] == [0, 0]
    assert losses(folder / "two.jsonl") == losses(folder / "one.jsonl")


def test_a_user_error_is_one_message_and_exit_code_2(folder: Path) -> None:
    done = torchrun(folder, "--set", "data.train=[{path: /nowhere}]")
    assert done.stderr.count("/data/train/0/path: /nowhere does not exist") == 1
    assert "exitcode  : 2" in done.stderr
    # What follows is torchrun's own report of its children.
    ours, _, _ = done.stderr.partition("torch/distributed/elastic/multiprocessing")
    assert "Traceback" not in ours


def test_a_loss_that_is_not_finite_is_one_message_and_exit_code_1(folder: Path) -> None:
    overrides = ["optimizer.lr=100", "optimizer.weight_decay=1", "training.steps=100"]
    done = train_alone(folder, *set_options(overrides))
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: the loss of step ")


def test_files_that_cannot_be_written_are_one_message(folder: Path) -> None:
    done = train_alone(folder, "--reports", "corpus.txt/reports.jsonl")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write --reports corpus.txt/reports.jsonl:")
    assert len(done.stderr.splitlines()) == 1
    path = folder / "corpus.txt" / "out"
    done = train_alone(folder, "--set", f"storage.path={path}")
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr


def set_options(overrides: list[str]) -> list[str]:
    options = []
    for override in overrides:
        options += ["--set", override]
    return options


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.nope=1", "/training/nope: unknown field"),
        ("parallel.tp=3", "/parallel/tp: tp=3 does not divide"),
        (
            "parallel.dp=1",
            "the layout needs a world size of 1, but torchrun started 2; use --nproc-per-node 1",
        ),
        ("nonsense", "expected path.to.field=value"),
    ],
)
def test_mistakes_in_the_spec_are_found_before_anything_starts(
    folder: Path, override: str, words: str
) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        read_spec(folder / "job.yaml", [override], 2)
    with pytest.raises(UserError, match=r"cannot read .*none.yaml: No such file"):
        read_spec(folder / "none.yaml", [], 2)


def test_the_spec_of_an_import_trains_and_one_that_contradicts_it_is_one_message(
    folder: Path,
) -> None:
    publish("llama", folder / "hf")
    (folder / "hf" / "tokenizer.json").write_text(Tokenizer.of_bytes().to_json())
    imported = import_folder(str(folder / "hf"), str(folder / "ours"))
    command = ["-m", "workers.rank", imported.spec]
    overrides = [
        f"data.train=[{{path: {folder / 'corpus.txt'}}}]",
        "training.steps=2",
        "training.global_batch_size=2",
        "resources.accelerator=cpu",
    ]
    done = run(folder, *command, *set_options(overrides))
    assert done.returncode == 0, done.stderr
    assert "finished; newest checkpoint:" in done.stdout
    # norm_eps contradicts the imported weights; rope_theta may be changed.
    overrides += ["model.rope_theta=20000", "model.norm_eps=0.1", "name=other"]
    done = run(folder, *command, *set_options(overrides))
    message = (
        "/model/norm_eps: norm_eps=0.1 contradicts the weights of checkpoint.start_from, which "
        "were made with 1e-05; set it to that"
    )
    assert done.returncode == 2
    assert done.stderr == f"error: the job cannot start:\n  {message}\n"
