"""Trains a tiny model with callbacks, on one rank or several, and brings home what they
report.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_ray.commands import Command
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.reports import MonitorReport, Report, StepReport
from megatron_ray.training.callbacks.assembly import make_callbacks
from megatron_ray.training.callbacks.protocol import CallbackContext
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.loop import train
from megatron_ray.training.progress import Progress
from megatron_ray.training.session import batch_maker, build
from tests.support.parity import END, NoSaver, RandomDataset, boxes, make_config, make_mesh

EVERY = {"every_steps": 1}
ALL: dict[str, Any] = {
    "optimizer": EVERY | {"by": "layer"},
    "activations": EVERY,
    "unigram": EVERY,
}


def with_callbacks(config: TrainConfig, **callbacks: Any) -> TrainConfig:
    fields = config.model_dump()
    fields["callbacks"] = callbacks
    # Where a gradient is nearly 0, its sign depends on the order of sums.
    fields["optimizer"]["eps"] = 1e-4
    return TrainConfig.from_mapping(fields)


def watched_config(
    model: dict[str, Any],
    parallel: dict[str, Any] | None = None,
    *,
    callbacks: dict[str, Any] = ALL,
    **settings: Any,
) -> TrainConfig:
    layout = {"dp": 1, "bucket_elements": 8000} | (parallel or {})
    steps = {"steps": 2} | settings
    return with_callbacks(make_config(model, layout, **steps), **callbacks)


@dataclass
class WatchedRun:
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    numbers: dict[int, dict[str, float]] = field(default_factory=dict)
    weights: list[tuple[str, tuple[int, ...], np.ndarray]] = field(default_factory=list)

    def note(self, report: Report) -> None:
        if isinstance(report, StepReport):
            self.losses.append(report.loss)
            self.grad_norms.append(report.grad_norm)
        if isinstance(report, MonitorReport):
            self.numbers[report.step] = report.numbers


def make_loader(config: TrainConfig, mesh: ParallelMesh) -> StepLoader:
    training = config.training
    ends = 0.15 if config.data.separate_documents else 0.0
    return StepLoader(
        RandomDataset(config.model.vocabulary, training.seq_length, ends),
        training.micro_batch_size,
        training.global_batch_size,
        mesh.dp_rank,
        mesh.dims.dp,
        batch_maker(config, mesh, END),
    )


def run_watched(rank: int, world_size: int, config: TrainConfig) -> WatchedRun:
    torch.set_num_threads(1)
    mesh = make_mesh(rank, world_size, config)
    model, optimizer = build(config, mesh)
    callbacks = make_callbacks(CallbackContext(config, mesh, model, optimizer))
    components = TrainingComponents(
        config,
        mesh,
        model,
        optimizer,
        make_loader(config, mesh),
        None,
        NoSaver(),
        callbacks=callbacks,
    )
    run = WatchedRun()
    assert train(components, Progress(), run.note, lambda: Command.CONTINUE) == "finished"
    run.weights = boxes(optimizer.sharded_state(), "model/")
    return run
