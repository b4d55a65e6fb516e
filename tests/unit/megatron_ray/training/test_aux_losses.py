"""What is trained on beside the loss is reported in the numbers that are known from
elsewhere.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ray.commands import Command
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.expert_parallel.layers import RouterLinear
from megatron_ray.reports import Report, StepReport
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.loop import train
from megatron_ray.training.progress import Progress
from megatron_ray.training.session import batch_maker, build
from megatron_ray.training.step import forward_backward
from tests.support.parity import LLAMA, NoSaver, RandomDataset, make_config

EXPERTS = {
    "num_experts": 4,
    "top_k": 2,
    "ffn_hidden_size": 48,
    "layer_pattern": [1, 0, 1],
    "aux_loss_coeff": 0.02,
    "z_loss_coeff": 1e-3,
}
MODEL = LLAMA | {
    "num_layers": 3,
    "moe": EXPERTS,
    "mtp": {"num_layers": 2, "loss_coeff": 0.3},
}
TOKENS = 64
"""Of the one microbatch."""


def balance(logits_TE: Tensor, by_sequence: bool) -> float:
    """E x sum over experts of (share of choices) x (mean probability), one where all
    are alike.
    """
    parts = logits_TE.chunk(2) if by_sequence else [logits_TE]
    shares = []
    for part in parts:
        chosen = torch.zeros_like(part).scatter_(1, part.topk(2).indices, 1.0)
        shares.append(4 * (chosen.mean(0) / 2 * part.softmax(-1).mean(0)).sum())
    return float(torch.stack(shares).mean())


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_losses_are_reported_before_their_coefficients_as_means_over_layers(
    kind: str,
) -> None:
    config = make_config(
        MODEL | {"moe": EXPERTS | {"aux_loss": kind}}, {"dp": 1}, steps=1, batch=2
    )
    mesh = ParallelMesh.single()
    loader = StepLoader(
        RandomDataset(config.model.vocabulary, 32), 2, 2, 0, 1, batch_maker(config, mesh)
    )
    model, _ = build(config, mesh)
    logits = list[Tensor]()
    losses = list[Tensor]()
    for part in model.module.modules():
        if isinstance(part, RouterLinear):
            part.register_forward_hook(lambda _, __, output: logits.append(output.detach()))
    model.module.head.register_forward_hook(
        lambda _, __, output: losses.append(output.detach())
    )
    (batch,) = loader.step(0)
    assert batch.num_tokens == TOKENS
    forward_backward(model, mesh, [batch])
    assert len(logits) == 4
    assert len(losses) == 3

    model, optimizer = build(config, mesh)
    reports: list[Report] = []
    parts: Any = TrainingComponents(config, mesh, model, optimizer, loader, None, NoSaver())
    assert train(parts, Progress(), reports.append, lambda: Command.CONTINUE) == "finished"
    (report,) = reports
    assert isinstance(report, StepReport)
    balancing = "load_balancing_loss" if kind == "aux_loss" else "seq_load_balancing_loss"
    expected = {
        balancing: sum(balance(layer, kind == "seq_aux_loss") for layer in logits) / 4,
        "z_loss": sum(float(layer.logsumexp(-1).square().mean()) for layer in logits) / 4,
        "mtp_1_loss": float(losses[1]) / (0.3 / 2) / TOKENS,
        "mtp_2_loss": float(losses[2]) / (0.3 / 2) / TOKENS,
    }
    assert report.other_losses == pytest.approx(expected, rel=1e-5)
    assert report.loss == pytest.approx(float(losses[0]) / TOKENS, rel=1e-6)
    assert 1.0 <= report.other_losses[balancing] < 2.0
    assert 4.0 < report.other_losses["mtp_1_loss"] < 7.0


def test_a_plain_model_reports_no_other_losses() -> None:
    assert make_config(LLAMA, {"dp": 1}, steps=1).model.aux_losses == {}
    without = make_config(
        MODEL
        | {"moe": EXPERTS | {"aux_loss_coeff": 0.0, "z_loss_coeff": 0.0}, "mtp": None},
        {"dp": 1},
        steps=1,
    )
    assert without.model.aux_losses == {}


def test_a_further_token_of_weight_zero_trains_and_is_not_reported() -> None:
    config = make_config(LLAMA | {"mtp": {"loss_coeff": 0.0}}, {"dp": 1}, steps=1, batch=2)
    mesh = ParallelMesh.single()
    model, optimizer = build(config, mesh)
    loader = StepLoader(
        RandomDataset(config.model.vocabulary, 32), 2, 2, 0, 1, batch_maker(config, mesh)
    )
    reports: list[Report] = []
    parts: Any = TrainingComponents(config, mesh, model, optimizer, loader, None, NoSaver())
    assert train(parts, Progress(), reports.append, lambda: Command.CONTINUE) == "finished"
    assert isinstance(reports[0], StepReport)
    assert reports[0].other_losses == {}
