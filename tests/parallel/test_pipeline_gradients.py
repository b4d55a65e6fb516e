"""Gradients of our pipelines equal those of torch.distributed.pipelining: same stages,
weights and microbatches, tensor by tensor.

Ours go through slots into main gradients. Torch's schedules collect `parameter.grad`,
so their side has the same stage modules without slots: a layer then returns its weight
gradient to autograd. That also lets torch's zero bubble, which takes a backward apart
by walking the graph, find the weights; our sink would be handed everything in its first
half.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch
from megatron_ray.models.gpt import GPT
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.parallelize.parallelize import build_model
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.sharding.parameters import local_parameters
from megatron_ray.training.session import batch_maker, build
from megatron_ray.training.step import forward_backward
from tests.support.parity import GPT2, LLAMA, RandomDataset, make_config, make_mesh
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel

# Untied: summing a tied embedding's two gradients is finalize_grads' work, which
# torch's schedules have no counterpart of.
MODELS = {
    "llama": LLAMA | {"num_layers": 4},
    "gpt2": GPT2 | {"num_layers": 4, "tie_embeddings": False},
}
TORCHS: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zb-h1": ScheduleInterleavedZeroBubble,
    "zb-v": ScheduleZBVZeroBubble,
}
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "gpipe"},
    {"schedule": "1f1b"},
    {"schedule": "interleaved", "vpp": 2},
    {"schedule": "zb-h1"},
    {"schedule": "zb-v", "vpp": 2},
]


@dataclass(frozen=True)
class Found:
    """Of one rank, model and schedule."""

    our_loss: float
    """Zero where the last stage is not, as the next."""
    torchs_loss: float
    distances: dict[str, float]
    """Relative L2 of each gradient."""


class Stage(nn.Module):
    """One of the model's stages as torch calls it: activations first, the microbatch's
    tokens and labels by name.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: ParallelMesh,
        contents: StageContents,
        weights: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.contents = contents
        self.part: GPT = build_model(
            config.model, mesh, config.parallel, dtype=torch.float32, stages=[contents]
        )
        self.part.to_empty(device="cpu")
        for name, parameter in self.part.named_parameters():
            parameter.data.copy_(weights[name])

    def forward(
        self, received_TH: Tensor | None = None, *, tokens: Tensor, labels: Tensor
    ) -> Tensor:
        positions = torch.arange(tokens.shape[1])[None]
        batch = Batch(tokens, labels, torch.ones(tokens.shape), positions, tokens.numel())
        output = self.part.stage(self.contents, received_TH, batch)
        return output[None] if self.contents.loss else output


def torchs_gradients(
    config: TrainConfig,
    mesh: ParallelMesh,
    contents: dict[int, StageContents],
    num_stages: int,
    weights: dict[str, Tensor],
    batches: list[Batch],
) -> tuple[float, dict[str, Tensor]]:
    """This rank's loss and gradients by torch's schedule of the same name."""
    sent = torch.empty(
        batches[0].num_tokens, config.model.hidden_size, device="meta", requires_grad=True
    )
    modules = {
        number: Stage(config, mesh, stage, weights) for number, stage in contents.items()
    }
    stages = [
        PipelineStage(
            module,
            number,
            num_stages,
            mesh.device,
            input_args=(sent,) if number else (),
            output_args=torch.empty(1, device="meta", requires_grad=True)
            if module.contents.loss
            else sent,
            group=mesh.pp_group,
        )
        for number, module in modules.items()
    ]
    kind = TORCHS[config.parallel.schedule]
    stage_or_stages: Any = (
        stages[0] if config.parallel.schedule in ("gpipe", "1f1b") else stages
    )
    schedule = kind(
        stage_or_stages,
        len(batches),
        loss_fn=lambda output, _: output.sum(),
        scale_grads=False,
    )
    losses: list[Tensor] = []
    schedule.step(
        target=torch.zeros(len(batches))
        if any(stage.loss for stage in contents.values())
        else None,
        losses=losses,
        tokens=torch.cat([batch.tokens_BS for batch in batches]),
        labels=torch.cat([batch.labels_BS for batch in batches]),
    )
    gradients: dict[str, Tensor] = {}
    for module in modules.values():
        for name, parameter in module.part.named_parameters():
            assert parameter.grad is not None, name
            gradients[name] = parameter.grad
    return sum(float(loss.item()) for loss in losses), gradients


def compare(rank: int, world_size: int, configs: list[TrainConfig]) -> list[Found]:
    """Every schedule by our runner and by torch's, on the same ranks."""
    mesh = make_mesh(rank, world_size, configs[0])
    return [compare_one(config, mesh) for config in configs]


def compare_one(config: TrainConfig, mesh: ParallelMesh) -> Found:
    training = config.training
    dataset = RandomDataset(config.model.vocabulary, config.training.seq_length)
    batches = StepLoader(
        dataset,
        training.micro_batch_size,
        training.global_batch_size,
        0,
        1,
        batch_maker(config, mesh),
    ).step(0)
    model, _ = build(config, mesh)
    loss = forward_backward(model, mesh, batches)
    buffers = model.parameter_groups[0].buffers
    ours = buffers.views(buffers.gradients)
    weights = buffers.views(buffers.parameters)
    stages = model.pipeline.stages
    contents = {
        stages.stage(mesh.pp_rank, chunk): stage
        for chunk, stage in enumerate(model.module.stages)
    }
    torchs_loss, torchs = torchs_gradients(
        config, mesh, contents, stages.num_stages, weights, batches
    )
    assert torchs.keys() == ours.keys()
    return Found(
        float(loss),
        torchs_loss,
        {name: distance(ours[name], torchs[name]) for name in ours},
    )


def distance(ours: Tensor, torchs: Tensor) -> float:
    return float((ours.double() - torchs.double()).norm() / torchs.double().norm())


@pytest.mark.parametrize(
    ("pp", "model", "cut"), [(2, "gpt2", {}), (4, "llama", {"layout": "E|t|t||t||t|L"})]
)
def test_gradients_are_those_of_torchs_schedules(
    pp: int, model: str, cut: dict[str, Any]
) -> None:
    layouts = [
        {"dp": 1, "pp": pp} | parallel | (cut if "vpp" in parallel else {})
        for parallel in SCHEDULES
    ]
    configs = [make_config(MODELS[model], layout, steps=1, batch=12) for layout in layouts]
    ranks = run_ranks(compare, pp, configs, timeout_s=120)
    for layout, config, *by_rank in zip(layouts, configs, *ranks, strict=True):
        ours = sum(result.our_loss for result in by_rank)
        torchs = sum(result.torchs_loss for result in by_rank)
        assert ours == pytest.approx(torchs, rel=1e-6), layout
        assert ours > 1000, layout
        distances = [
            (name, value) for result in by_rank for name, value in result.distances.items()
        ]
        assert sorted(name for name, _ in distances) == sorted(
            local.name for local in local_parameters(config.model, ParallelDims(), 0)
        )
        assert [entry for entry in distances if not entry[1] <= 2e-6] == [], layout
