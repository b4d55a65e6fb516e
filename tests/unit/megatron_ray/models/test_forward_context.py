"""What a pass does is decided by its mode alone: validation drops nothing and counts
nothing, and a training step counts everything once.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.datasets import EvaluationSource
from megatron_ray.data.loader import StepLoader, evaluation_batches
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch
from megatron_ray.models.forward_context import ForwardMode
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.training.evaluate import Evaluation, evaluate
from megatron_ray.training.session import batch_maker, build
from megatron_ray.training.step import forward_backward
from tests.support.parity import LLAMA, RandomDataset, make_config

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "top_k": 2,
    "ffn_hidden_size": 48,
    "score_function": "sigmoid",
    "expert_bias": True,
    "aux_loss_coeff": 0.02,
    "z_loss_coeff": 1e-3,
}
MESH = ParallelMesh.single()
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "moe": {"granularity": "selective", "modules": ["norm", "moe"]},
    "uniform": {"granularity": "full", "method": "uniform", "num_layers": 2},
    "block": {"granularity": "full", "method": "block", "num_layers": 1},
    "operations": {"granularity": "operations"},
}


def model_of(
    model: dict[str, Any], recompute: str = "none"
) -> tuple[ParallelModel, TrainConfig]:
    fields = make_config(LLAMA | model, {"dp": 1}, steps=1).model_dump()
    fields["training"]["recompute"] = RECOMPUTE[recompute]
    config = TrainConfig.from_mapping(fields)
    parallel_model, _ = build(config, MESH)
    return parallel_model, config


def step_batches(config: TrainConfig) -> list[Batch]:
    dataset = RandomDataset(config.model.vocabulary, 32)
    return StepLoader(dataset, 2, 4, 0, 1, batch_maker(config, MESH)).step(0)


def validation_loss(model: ParallelModel, config: TrainConfig) -> float:
    dataset = RandomDataset(config.model.vocabulary, 32)
    sources = [EvaluationSource("all", dataset, 3)]
    make_batch = batch_maker(config, MESH)
    evaluation = Evaluation(
        sources, lambda: evaluation_batches(sources, 2, 0, 1, make_batch)
    )
    return evaluate(model, evaluation, MESH, step=0, split="validation").loss


@pytest.mark.parametrize("pad_to_capacity", [False, True])
def test_validation_drops_no_tokens_of_full_experts_while_training_does(
    pad_to_capacity: bool,
) -> None:
    capacity = {"capacity_factor": 0.25, "pad_to_capacity": pad_to_capacity}
    limited, limited_config = model_of({"moe": EXPERTS | capacity})
    dropless, dropless_config = model_of({"moe": EXPERTS})
    expected = validation_loss(dropless, dropless_config)
    assert validation_loss(limited, limited_config) == expected
    batches = step_batches(dropless_config)
    loss = forward_backward(dropless, MESH, batches)
    limited_loss = forward_backward(limited, MESH, batches)
    assert not torch.equal(limited_loss, loss)


def test_generation_drops_no_tokens_of_full_experts() -> None:
    limited, config = model_of({"moe": EXPERTS | {"capacity_factor": 0.25}})
    dropless, _ = model_of({"moe": EXPERTS})
    batch = step_batches(config)[0]
    logits = limited.module.logits(batch.tokens_BS, batch.position_ids)
    expected = dropless.module.logits(batch.tokens_BS, batch.position_ids)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_step_counts_tokens_and_losses_once_whatever_is_recomputed(
    recompute: str,
) -> None:
    model, config = model_of({"moe": EXPERTS}, recompute)
    batches = step_batches(config)
    forward_backward(model, MESH, batches)
    tokens = sum(batch.tokens_BS.numel() for batch in batches)
    assert len(model.expert_biases) == config.model.num_layers
    for bias in model.expert_biases.values():
        assert bias.tokens.sum() == tokens * EXPERTS["top_k"]
    plain, _ = model_of({"moe": EXPERTS})
    forward_backward(plain, MESH, batches)
    for kind, losses in model.aux_losses.items():
        assert len(losses) == config.model.num_layers
        for loss, expected in zip(losses, plain.aux_losses[kind], strict=True):
            assert torch.equal(taken(loss), taken(expected))


def taken(loss: Any) -> Tensor:
    total: Tensor = loss.take()
    return total


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_validation_counts_nothing_even_where_autograd_records(recompute: str) -> None:
    model, config = model_of({"moe": EXPERTS}, recompute)
    batch = step_batches(config)[0]
    validation_loss(model, config)
    model.begin_step()
    model.sink.begin_microbatch(last=True)
    model.module(batch, ForwardMode.EVAL).backward()
    for bias in model.expert_biases.values():
        assert bias.tokens.sum() == 0
    for losses in model.aux_losses.values():
        for loss in losses:
            assert loss.take() is None


@pytest.mark.parametrize("recompute", ["none", "uniform"])
def test_mtp_layers_run_in_training_only(recompute: str) -> None:
    model, config = model_of({"mtp": {"num_layers": 2}}, recompute)
    runs = list[nn.Module]()
    for mtp_layer in model.module.mtp.values():
        mtp_layer.register_forward_hook(lambda module, *_: runs.append(module))
    validation_loss(model, config)
    batches = step_batches(config)
    model.module(batches[0], ForwardMode.EVAL)
    assert runs == []
    forward_backward(model, MESH, batches)
    assert runs == [*model.module.mtp.values()] * len(batches)


def test_each_pass_of_a_recomputed_region_has_its_part_of_a_training_pass() -> None:
    first = ForwardMode.CHECKPOINTED
    second = ForwardMode.RECOMPUTE
    assert first.is_training
    assert second.is_training
    assert (first.is_first_run, second.is_first_run) == (True, False)
    assert (first.attaches_losses, second.attaches_losses) == (False, True)
