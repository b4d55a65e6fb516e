"""How much a step slows down while a checkpoint is written in the background: one rank,
a model of 30 million parameters; and how much by copies in the ranks' memory, two ranks.
"""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.reports import CheckpointReport, Report, StepReport
from megatron_ray.training.session import TrainingSession
from tests.support.ranks import run_ranks
from workers.rank.environment import RankEnv
from workers.rank.messages import StartRequest
from workers.rank.peer_attempt import attempt_copies
from workers.rank.process_copies import ProcessCopies

STEPS = 60
EVERY = 10
TURNS = 3


def run() -> Iterator[dict[str, Any]]:
    yield from checkpoints()
    yield from peer_copies()


def checkpoints() -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-save-") as folder:
        reports: list[Report] = []
        (Path(folder) / "text.txt").write_text(
            " ".join(str(number * number % 997) for number in range(20_000))
        )
        config = _config(folder)
        data = prepare(config.data, f"{folder}/data", seq_length=config.training.seq_length)
        TrainingSession(config, ParallelMesh.single(), data, report=reports.append).run()
    quiet: list[float] = []
    busy: list[float] = []
    saving = False
    for report in reports:
        if isinstance(report, CheckpointReport):
            saving = False
        elif isinstance(report, StepReport):
            # A step counts as busy from the save's copy until this rank's part is
            # durable; the first ones warm up.
            saving = saving or ((report.step - 1) % EVERY == 0 and report.step > EVERY)
            if report.step > 3:
                (busy if saving else quiet).append(report.step_s)
    ratios = [seconds / statistics.median(quiet) for seconds in busy]
    low, middle, high = statistics.quantiles(ratios, n=4)
    yield {
        "bench": "save",
        "case": "async",
        "value": round(middle, 3),
        "unit": "times the median step, while a save is under way",
        "baseline": round(statistics.median(quiet), 4),
        "goal": 1.5,
        "quartiles": [round(low, 3), round(high, 3)],
        "worst": round(max(ratios), 3),
        "steps_during_saves": len(ratios),
    }


def peer_copies() -> Iterator[dict[str, Any]]:
    """Runs with and without copies, turn by turn."""
    with tempfile.TemporaryDirectory(prefix="bench-copies-") as folder:
        (Path(folder) / "text.txt").write_text(
            " ".join(str(number * number % 997) for number in range(20_000))
        )
        plain = _config(folder, parallel={"dp": 2}, checkpoint={})
        training = plain.training.model_copy(update={"global_batch_size": 2})
        plain = plain.model_copy(update={"training": training})
        data = prepare(plain.data, f"{folder}/data", seq_length=training.seq_length)
        with_copies = plain.checkpoint.model_copy(update={"peer_every_steps": EVERY})
        copying = plain.model_copy(update={"checkpoint": with_copies})
        ratios = []
        for _ in range(TURNS):
            without = run_ranks(step_seconds, 2, plain, data, timeout_s=300)[0]
            seconds = run_ranks(step_seconds, 2, copying, data, timeout_s=300)[0]
            ratios.append(sum(seconds) / sum(without))
    yield {
        "bench": "save",
        "case": "peer-copies",
        "value": round(statistics.median(ratios), 3),
        "unit": f"times the steps without, a copy every {EVERY} steps, two ranks",
        "baseline": None,
        "goal": 1.1,
        "worst": round(max(ratios), 3),
    }


def step_seconds(
    rank: int, world_size: int, config: TrainConfig, data: PreparedData
) -> list[float]:
    """Seconds of each step but the first ones, which warm up; copies included."""
    torch.set_num_threads(1)
    reports: list[Report] = []
    mesh = ParallelMesh.create(ParallelDims(dp=2), World(rank, world_size, rank, "cpu"))
    request = StartRequest(
        RankEnv(rank, world_size, rank, world_size),
        config.model_dump(mode="json"),
        data.model_dump(mode="json"),
        attempt=1,
        device="cpu",
        partner=1 - rank,
    )
    peers = ProcessCopies("bench", "127.0.0.1", Path("/nowhere"))
    store = dist.distributed_c10d._get_default_store()
    with attempt_copies(peers, request, store, mesh, reports.append) as copies:
        TrainingSession(config, mesh, data, report=reports.append, copies=copies).run()
    steps = [report for report in reports if isinstance(report, StepReport)]
    return [report.step_s for report in steps[3:]]


def _config(folder: str, **changes: Any) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {
                "num_layers": 8,
                "hidden_size": 512,
                "num_attention_heads": 8,
                "ffn_hidden_size": 1536,
                "vocab_size": 4096,
            },
            "data": {
                "train": [{"path": f"{folder}/text.txt"}],
                "tokenizer": {"kind": "bytes"},
            },
            "training": {
                "seq_length": 128,
                "micro_batch_size": 1,
                "global_batch_size": 1,
                "steps": STEPS,
            },
            "optimizer": {"lr": 1e-4},
            "checkpoint": {"every_steps": EVERY},
            "storage": {"path": folder},
            **changes,
        }
    )
