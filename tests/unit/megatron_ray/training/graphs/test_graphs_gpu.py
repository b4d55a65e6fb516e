"""Replayed steps on CUDA: the numbers of steps whose kernels are launched one by one, from
one capture and one launch for all passes of a step.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ray.commands import Command
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.optimizer.finalize_grads import scale_and_clip
from megatron_ray.optimizer.step_sums import SkipRule
from megatron_ray.reports import Report, StepReport
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.graphs.recordings import CudaRecording
from megatron_ray.training.loop import train
from megatron_ray.training.progress import Progress
from megatron_ray.training.session import batch_maker, build
from megatron_ray.training.step import reduce_step
from tests.support.parity import GPT2, LLAMA, NoSaver, RandomDataset, make_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 10
EXPERTS = LLAMA | {
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "ffn_hidden_size": 48,
        "score_function": "sigmoid",
        "expert_bias": True,
        "aux_loss_coeff": 0.02,
        "capacity_factor": 1.25,
        "pad_to_capacity": True,
    },
    "mtp": {"num_layers": 1},
}
RECOMPUTE = {"granularity": "selective", "modules": ["norm", "activation"]}


def with_training(config: TrainConfig, **training: Any) -> TrainConfig:
    fields = config.model_dump(mode="json")
    fields["training"] |= training
    return TrainConfig.from_mapping(fields)


def components_of(config: TrainConfig) -> TrainingComponents:
    mesh = ParallelMesh.single("cuda")
    model, optimizer = build(config, mesh)
    loader = StepLoader(
        RandomDataset(config.model.vocabulary, 32), 2, 8, 0, 1, batch_maker(config, mesh)
    )
    return TrainingComponents(config, mesh, model, optimizer, loader, None, NoSaver())


def numbers_of(config: TrainConfig) -> list[list[float]]:
    reports: list[StepReport] = []

    def note(report: Report) -> None:
        if isinstance(report, StepReport):
            reports.append(report)

    components = components_of(config)
    train(components, Progress(), note, lambda: Command.CONTINUE)
    components.passes.release()
    for report in reports:
        assert sum(report.split_s.values()) == pytest.approx(report.step_s, rel=1e-6)
    return [
        [report.loss, report.grad_norm, *report.other_losses.values()] for report in reports
    ]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Captures and launches, in their order."""
    noted: list[str] = []

    def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            noted.append(name)
            return method(*arguments)

        return call

    for name in ("__init__", "replay"):
        method = getattr(CudaRecording, name)
        monkeypatch.setattr(CudaRecording, name, noting(name, method))
    return noted


@pytest.mark.parametrize(
    ("model", "training"),
    [
        (LLAMA, {}),
        (GPT2, {"precision": "bf16"}),
        (LLAMA, {"precision": "fp16"}),
        (EXPERTS, {}),
        (EXPERTS, {"precision": "bf16"}),
        (LLAMA, {"precision": "bf16", "recompute": RECOMPUTE}),
        (LLAMA, {"precision": "bf16", "compile": "blocks"}),
    ],
    ids=["fp32", "bf16", "fp16", "experts", "experts-bf16", "recompute", "compile"],
)
def test_replayed_steps_are_those_that_are_launched(
    model: dict[str, Any], training: dict[str, Any], events: list[str]
) -> None:
    config = make_config(model, {"dp": 1}, steps=STEPS)
    config = with_training(config, **training)
    plain = numbers_of(config)
    assert events == []
    replayed = numbers_of(with_training(config, cuda_graph={"warmup_steps": 3}))
    assert events == ["__init__", *["replay"] * (STEPS - 3)]
    # Sums of embeddings' gradients are in no fixed order.
    rtol = 1.5e-2
    if not training:
        rtol = 5e-5
    np.testing.assert_allclose(replayed, plain, rtol=rtol)


def test_a_replayed_step_neither_waits_nor_allocates_for_its_passes() -> None:
    config = make_config(LLAMA, {"dp": 1}, steps=6, precision="bf16")
    parts = components_of(with_training(config, cuda_graph={"warmup_steps": 1}))
    for step in range(6):
        batches = parts.loader.step(8 * step)
        if step > 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            loss = parts.passes.run(batches, lambda _: None)
            allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - before
            tokens = sum(batch.num_tokens for batch in batches)
            stats = reduce_step(
                parts.model,
                parts.optimizer,
                parts.mesh,
                loss,
                tokens,
                skip_rule=SkipRule.IF_NOT_FINITE,
            )
            scale_and_clip(parts.optimizer, stats, 1.0)
            parts.optimizer.step(1e-3, stats.skip)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if step > 2:
            assert allocations == 0
    parts.passes.release()
