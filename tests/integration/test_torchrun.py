"""The same loop without Ray: torchrun, two ranks, a checkpoint, and going on from it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ray.checkpoint.hf.importing import import_folder
from megatron_ray.data.tokenizer import Tokenizer
from tests.unit.megatron_ray.checkpoint.hf_folders import publish
from workers.rank.messages import UserError
from workers.standalone import read_spec

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


def torchrun(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "workers.rank",
        "job.yaml",
    ]
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text(
        "the quick brown fox jumps over the lazy dog\n" * 500
    )
    text = JOB.replace("CORPUS", str(tmp_path / "corpus.txt")).replace(
        "STORAGE", str(tmp_path / "out")
    )
    (tmp_path / "job.yaml").write_text(text)
    return tmp_path


def losses(path: Path) -> list[tuple[int, int, float]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        (record["attempt"], record["data"]["step"], record["data"]["loss"])
        for record in records
        if record["kind"] == "step"
    ]


def test_trains_commits_and_resumes_bit_for_bit(folder: Path) -> None:
    whole = torchrun(folder, "--set", "parallel.tp=2", "--reports", "whole.jsonl")
    assert whole.returncode == 0, whole.stderr
    assert "finished; newest checkpoint:" in whole.stdout
    kept = sorted(path.name for path in (folder / "out" / "checkpoints").iterdir())
    assert kept == ["step-00000004-a0001", "step-00000006-a0001"]
    assert all(
        (folder / "out" / "checkpoints" / name / "COMMITTED").exists() for name in kept
    )
    (folder / "out" / "checkpoints" / kept[1] / "COMMITTED").unlink()
    again = torchrun(
        folder, "--set", "parallel.tp=2", "--reports", "again.jsonl", "--resume"
    )
    assert again.returncode == 0, again.stderr
    assert losses(folder / "again.jsonl") == [
        (2, step, loss) for _, step, loss in losses(folder / "whole.jsonl")[4:]
    ]


def test_a_mistake_is_one_message_and_exit_code_2(folder: Path) -> None:
    done = torchrun(folder, "--set", "data.train=[{path: /nowhere}]")
    assert done.stderr.count("/data/train/0/path: /nowhere does not exist") == 1
    assert "exitcode  : 2" in done.stderr
    own = done.stderr.partition("torch/distributed/elastic/multiprocessing")[0]
    assert "Traceback" not in own


def test_a_loss_that_is_no_number_is_one_message_and_exit_code_1(folder: Path) -> None:
    overrides = [
        "--set",
        "optimizer.lr=100",
        "--set",
        "optimizer.weight_decay=1",
        "--set",
        "training.steps=100",
    ]
    command = [sys.executable, "-m", "workers.rank", "job.yaml", *overrides]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: the loss of step ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.nope=1", "/training/nope: Extra inputs are not permitted"),
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
    with pytest.raises(UserError, match="cannot read .*none.yaml: No such file"):
        read_spec(folder / "none.yaml", [], 2)


def test_the_spec_of_an_import_trains_and_one_that_contradicts_it_is_one_message(
    folder: Path,
) -> None:
    publish("llama", folder / "hf")
    (folder / "hf" / "tokenizer.json").write_text(Tokenizer.of_bytes().to_json())
    imported = import_folder(str(folder / "hf"), str(folder / "ours"))
    overrides = [
        "data.train=[{path: CORPUS}]",
        "training.steps=2",
        "training.global_batch_size=2",
        "resources.accelerator=cpu",
    ]
    settings = [
        part.replace("CORPUS", str(folder / "corpus.txt"))
        for text in overrides
        for part in ("--set", text)
    ]
    command = [sys.executable, "-m", "workers.rank", imported.spec, *settings]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0 and "finished; newest checkpoint:" in done.stdout, (
        done.stderr
    )
    done = subprocess.run(
        [
            *command,
            "--set",
            "model.rope_theta=20000",
            "--set",
            "model.norm_eps=0.1",
            "--set",
            "name=other",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    text = (
        "/model/norm_eps: norm_eps=0.1 contradicts the weights of checkpoint.start_from, which "
        "were made with 1e-05; set it to that"
    )
    assert done.returncode == 2
    assert done.stderr == f"error: the job cannot start:\n  {text}\n"
