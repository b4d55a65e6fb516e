"""How much a step slows down while a checkpoint is written in the background: one rank,
a model of 30 million parameters.
"""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.reports import CheckpointReport, Report, StepReport
from megatron_ray.training.session import TrainingSession

STEPS = 60
EVERY = 10


def run() -> Iterator[dict[str, Any]]:
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


def _config(folder: str) -> TrainConfig:
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
        }
    )
