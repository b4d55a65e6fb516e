"""Passes of a whole model that take turns inside of its layers, without other ranks."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.interleaver import Interleaver
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.expert_parallel.dispatch import Capacity, Dispatched
from megatron_ray.models.layers import Dispatcher
from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.training.session import build
from megatron_ray.training.step import forward_backward
from tests.support.parity import LLAMA, make_config, random_loader

MOE = LLAMA | {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48}}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


class Switch(AutogradFunction[Tensor]):
    """Stands in for an all-to-all of one rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, interleaver: Interleaver) -> Tensor:
        ctx.interleaver = interleaver
        interleaver.switch()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.interleaver.switch()
        return grad, None


class SwitchingDispatcher:
    def __init__(self, dispatcher: Dispatcher, interleaver: Interleaver) -> None:
        self.dispatcher = dispatcher
        self.interleaver = interleaver

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, capacity: Capacity) -> Dispatched:
        rows = Switch.apply(x_TH, self.interleaver)
        return self.dispatcher.dispatch(rows, experts_TK, capacity)


def gradients(kind: str, *, in_pairs: bool) -> tuple[list[Tensor], list[str]]:
    """Gradients of three microbatches, and the passes in which they were computed."""
    mesh = ParallelMesh.single(kind)
    config = make_config(MOE, {"dp": 1}, steps=1, batch=3, micro_batch=1)
    model, _ = build(config, mesh)
    for block in model.module.blocks:
        assert block.moe is not None
        block.moe.dispatcher = SwitchingDispatcher(block.moe.dispatcher, mesh.interleaver)
    pipeline = replace(model.pipeline, in_pairs=in_pairs)
    actions = partial(pipeline.training_actions, pp_rank=0)
    model = replace(model, pipeline=pipeline, actions=actions)
    passes: list[str] = []
    batches = random_loader(config, mesh, StepLoader).step(0)
    forward_backward(model, mesh, batches, passes.append)
    buffers = [group.buffers.gradients for group in model.parameter_groups]
    return [buffer.clone() for buffer in buffers], passes


@pytest.mark.parametrize("kind", DEVICES)
def test_gradients_are_those_of_one_pass_after_another(kind: str) -> None:
    expected, one_after_another = gradients(kind, in_pairs=False)
    interleaved, in_turns = gradients(kind, in_pairs=True)
    assert one_after_another == ["forward", "backward"] * 3
    # Each of the two layers switches once in each pass.
    assert in_turns == ["forward", *["forward", "backward"] * 6, "backward"]
    for gradient, plain in zip(interleaved, expected, strict=True):
        assert plain.any()
        if kind == "cpu":
            assert torch.equal(gradient, plain)
        else:
            torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-6)
