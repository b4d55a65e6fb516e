"""Replica groups in one process: each is a rank of its own with the samples of its group,
and what is due is averaged by plain arithmetic. The definition that real ranks are
compared with.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.optimizer.finalize_grads import scale_and_clip
from megatron_ray.optimizer.sharded import ShardedOptimizer
from megatron_ray.optimizer.step_rates import RunRates
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.reports import Report, StepReport
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.loop import train
from megatron_ray.training.progress import Progress
from megatron_ray.training.session import batch_maker, build, no_command
from megatron_ray.training.step import forward_backward, reduce_step
from tests.support.parity import (
    NoSaver,
    RandomDataset,
    boxes,
    make_config,
    make_mesh,
    random_loader,
)

Boxes = list[tuple[str, tuple[int, ...], np.ndarray]]
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "clip_grad_norm": 0}


def with_groups(
    model: dict[str, Any],
    parallel: dict[str, Any],
    steps: int,
    optimizer: dict[str, Any] | None = None,
    precision: str = "fp32",
    **local_sgd: Any,
) -> TrainConfig:
    """The usual config of parity tests, with `local_sgd` if anything is given for it."""
    plain = make_config(model, parallel, steps=steps, precision=precision)
    fields = plain.model_dump(exclude_unset=True)
    if local_sgd:
        fields["parallel"]["local_sgd"] = local_sgd
    if optimizer is not None:
        fields["optimizer"] = optimizer
    return TrainConfig.from_mapping(fields)


@dataclass
class Trained:
    """What one rank brings home after its last step; boxes as in `RankResult`."""

    group: int
    losses: list[float]
    grad_norms: list[float]
    state: dict[str, Boxes]
    """By `model/`, and `optimizer/...` for each moment."""


def train_rank(
    rank: int, world_size: int, config: TrainConfig, moments: tuple[str, ...] = ()
) -> Trained:
    """Runs the real loop on one rank."""
    torch.set_num_threads(1)
    mesh = make_mesh(rank, world_size, config)
    loader = random_loader(config, mesh, StepLoader)
    model, optimizer = build(config, mesh)
    reports: list[StepReport] = []

    def note(report: Report) -> None:
        if isinstance(report, StepReport):
            reports.append(report)

    parts = TrainingComponents(config, mesh, model, optimizer, loader, None, NoSaver())
    train(parts, Progress(), note, no_command)
    state = optimizer.sharded_state()
    prefixes = ("model/", *(f"optimizer/{name}/" for name in moments))
    return Trained(
        mesh.dims.replica_group_index(rank),
        [report.loss for report in reports],
        [report.grad_norm for report in reports],
        {prefix: boxes(state, prefix) for prefix in prefixes},
    )


@dataclass
class Group:
    """One group as a rank of its own."""

    loaders: list[StepLoader]
    model: ParallelModel
    optimizer: ShardedOptimizer

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Whole live tensors by logical name."""
        whole = {}
        for name, entry in self.optimizer.sharded_state().items():
            if name.startswith(prefix):
                (box,) = entry.boxes
                whole[name.removeprefix(prefix)] = box.tensor
        return whole


def fragment(name: str, fragments: int) -> int:
    kind, index, *_ = name.split(".")
    if kind == "layers":
        return int(index) % fragments
    return 0 if "embedding" in kind else fragments - 1


def is_due(step: int, every: int, part: int, fragments: int) -> bool:
    return step % every == (every - part * every // fragments) % every


@torch.no_grad()
def average(groups: list[Group], prefix: str, names: list[str]) -> None:
    for name in names:
        parts = [group.tensors(prefix)[name] for group in groups]
        mean = torch.stack(parts).mean(0)
        for part in parts:
            part.copy_(mean)


class Outer:
    """torch's own SGD on the difference to what was synchronized last."""

    def __init__(self, group: Group, numbers: dict[str, Any]) -> None:
        self.synced = {
            name: torch.nn.Parameter(tensor.clone())
            for name, tensor in group.tensors("model/").items()
        }
        self.sgds = {
            name: torch.optim.SGD([tensor], **numbers)
            for name, tensor in self.synced.items()
        }

    def step(self, groups: list[Group], names: list[str]) -> None:
        for name in names:
            synced = self.synced[name]
            synced.grad = synced.detach() - groups[0].tensors("model/")[name]
            self.sgds[name].step()
            for group in groups:
                with torch.no_grad():
                    group.tensors("model/")[name].copy_(synced)


def make_groups(config: TrainConfig) -> list[Group]:
    local_sgd = config.parallel.local_sgd
    dp = config.parallel.dp
    assert local_sgd is not None
    assert isinstance(dp, int)
    training = config.training
    fields = config.model_dump(exclude_unset=True)
    fields["parallel"] = {"dp": 1}
    single = TrainConfig.from_mapping(fields)
    mesh = ParallelMesh.single()
    inner = dp // local_sgd.groups
    groups = []
    for index in range(local_sgd.groups):
        loaders = [
            StepLoader(
                RandomDataset(config.model.vocabulary, training.seq_length),
                training.micro_batch_size,
                training.global_batch_size,
                index * inner + place,
                dp,
                batch_maker(single, mesh),
            )
            for place in range(inner)
        ]
        groups.append(Group(loaders, *build(single, mesh)))
    return groups


def train_groups(config: TrainConfig) -> tuple[list[float], list[Group]]:
    """Losses of all steps, and the groups after the last one."""
    torch.set_num_threads(1)
    local_sgd = config.parallel.local_sgd
    assert local_sgd is not None
    training = config.training
    mesh = ParallelMesh.single()
    rates = RunRates(config)
    groups = make_groups(config)
    outer = None
    if local_sgd.outer_optimizer is not None:
        outer = Outer(groups[0], local_sgd.outer_optimizer.model_dump())
    names = list(groups[0].tensors("model/"))
    losses = []
    for step in range(1, training.num_steps + 1):
        loss_sum = 0.0
        num_tokens = 0
        for group in groups:
            consumed = (step - 1) * training.global_batch_size
            batches = [batch for each in group.loaders for batch in each.step(consumed)]
            tokens = sum(batch.num_tokens for batch in batches)
            loss = forward_backward(group.model, mesh, batches)
            sums = reduce_step(group.model, group.optimizer, mesh, loss, tokens)
            scale_and_clip(group.optimizer, sums, config.optimizer.clip_grad_norm)
            group.optimizer.step(rates.at(step).lr)
            loss_sum += float(loss)
            num_tokens += tokens
        losses.append(loss_sum / num_tokens)
        for part in range(local_sgd.fragments):
            own = [name for name in names if fragment(name, local_sgd.fragments) == part]
            due = is_due(step, local_sgd.sync_every, part, local_sgd.fragments)
            if due or step == training.num_steps:
                average(groups, "model/", own)
                if outer is not None:
                    outer.step(groups, own)
            for moment, period in local_sgd.sync_moments_every.items():
                if is_due(step, period, part, local_sgd.fragments):
                    average(groups, f"optimizer/{moment}/", own)
        for group in groups:
            group.optimizer.publish()
    return losses, groups
