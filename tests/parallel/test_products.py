"""Which products a step computes: a zero-bubble backward is cut where it is said to be, and nothing is multiplied twice.

Every linear layer [O, I] is one product per pass, known by its shape: T,I,O forward, T,O,I for the input gradient, O,T,I for the
weight gradient, with T other than any O and I here. Attention's products have no weights and belong to forward and input gradient.
"""

from collections import Counter
from typing import Any

import pytest
import torch

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.pipeline_parallel.runner import PipelineRunner, Transfer
from megatron_ray.schedules.actions import Action, Op
from megatron_ray.training.session import batch_maker, build
from tests.parallel.parity import GPT2, LLAMA, RandomDataset, make_config, make_mesh
from tests.parallel.products import Products, Shape, flops, linear_layers
from tests.ranks import run_ranks

pytestmark = pytest.mark.parallel
TOKENS = 32

Counts = tuple[Counter[Shape], Counter[str]]


def count_by_action(rank: int, world_size: int, config: TrainConfig) -> tuple[list[tuple[Action, Counts]], list[tuple[int, int]]]:
    """What each action of a step multiplied, and the linear layers of this rank."""
    mesh = make_mesh(rank, world_size, config)
    model, _ = build(config, mesh)
    loader = StepLoader(
        RandomDataset(config.model.vocabulary, TOKENS), 1, config.training.global_batch_size, 0, 1, batch_maker(config, mesh)
    )
    batches, (stage,) = loader.step(0), model.module.held
    model.begin_step()
    found: list[tuple[Action, Counts]] = []
    with Products() as products:
        runner = PipelineRunner(
            model.actions,
            model.pipeline.stages,
            [lambda received, microbatch: model.module.stage(stage, received, batches[microbatch])],
            mesh.pp_group,
            Transfer((TOKENS, config.model.hidden_size), torch.float32, mesh.device),
            model.sink,
            lambda action: found.append((action, products.take())),
        )
        runner.step()
    return found, linear_layers(model.module)


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_zero_bubble_backward_is_cut_between_input_and_weight_gradients(model: dict[str, Any]) -> None:
    config = make_config(model, {"dp": 1, "pp": 2, "schedule": "zb-h1"}, steps=1, micro_batch=1)
    for found, layers in run_ranks(count_by_action, 2, config):
        assert len(layers) >= 4 and all(TOKENS not in layer for layer in layers)
        expected = {
            Op.FORWARD: Counter((TOKENS, inputs, outputs) for outputs, inputs in layers),
            Op.BACKWARD_INPUT: Counter((TOKENS, outputs, inputs) for outputs, inputs in layers),
            Op.BACKWARD_WEIGHT: Counter((outputs, TOKENS, inputs) for outputs, inputs in layers),
        }
        total = Counter[Op]()
        for action, (linear, attention) in found:
            assert linear == expected.get(action.op, Counter()), action
            kinds = {"backward" in name for name in attention}
            assert kinds == {Op.FORWARD: {False}, Op.BACKWARD_INPUT: {True}}.get(action.op, set()), (action, attention)
            total[action.op] += flops(linear)
        forward = sum(2 * TOKENS * outputs * inputs for outputs, inputs in layers) * config.training.global_batch_size
        assert total[Op.FORWARD] == total[Op.BACKWARD_INPUT] == total[Op.BACKWARD_WEIGHT] == forward
        assert sum(total.values()) == 3 * forward, "nothing is computed twice"
