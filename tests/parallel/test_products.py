"""Which products a step computes: a zero-bubble backward is cut where it should be,
and nothing is multiplied twice.

Every linear layer [O, I] is one product per pass, known by its shape: T,I,O forward,
T,O,I for the input gradient, O,T,I for the weight gradient, with T other than any O and
I here. Attention's products have no weights and belong to forward and input gradient.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch
from megatron_ray.models.gpt import GPT
from megatron_ray.pipeline_parallel.runner import PipelineRunner, Transfer
from megatron_ray.pipeline_parallel.schedules.actions import Action, Op
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.training.session import batch_maker, build
from tests.support.parity import GPT2, LLAMA, RandomDataset, make_config, make_mesh
from tests.support.products import Products, Shape, flops, linear_layers
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
TOKENS = 32

Counts = tuple[Counter[Shape], Counter[str]]


@dataclass(frozen=True)
class Counted:
    """What each action of a step on one rank multiplied, and the linear layers of its
    chunks.
    """

    actions: list[tuple[Action, Counts]]
    layers: list[list[tuple[int, int]]]


def count_by_action(
    rank: int, world_size: int, configs: list[TrainConfig]
) -> list[Counted]:
    mesh = make_mesh(rank, world_size, configs[0])
    return [count_one(config, mesh) for config in configs]


def count_one(config: TrainConfig, mesh: ParallelMesh) -> Counted:
    model, _ = build(config, mesh)
    dataset = RandomDataset(config.model.vocabulary, TOKENS)
    count = config.training.global_batch_size
    batches = StepLoader(dataset, 1, count, 0, 1, batch_maker(config, mesh)).step(0)
    module = model.module
    transfer = Transfer((TOKENS, config.model.hidden_size), torch.float32, mesh.device)
    chunks = [partial(run_stage, module, stage, batches) for stage in module.stages]
    counts: list[tuple[Action, Counts]] = []
    model.begin_step()
    with Products() as products:

        def note(action: Action) -> None:
            counts.append((action, products.take()))

        PipelineRunner(
            model.actions(count),
            model.pipeline.stages,
            chunks,
            mesh.pp_group,
            transfer,
            mesh.interleaver,
            model.sink,
            note,
        ).step()
    return Counted(
        counts, [linear_layers(parts_of(module, stage)) for stage in module.stages]
    )


def run_stage(
    module: GPT,
    stage: StageContents,
    batches: list[Batch],
    received: Tensor | None,
    microbatch: int,
) -> Tensor:
    return module.stage(stage, received, batches[microbatch])


def parts_of(module: GPT, stage: StageContents) -> nn.ModuleList:
    return nn.ModuleList(
        [module.layers[str(index)] for index in stage.layers]
        + ([module.head] if stage.loss else [])
    )


def test_a_zero_bubble_backward_is_cut_between_input_and_weight_gradients() -> None:
    schedules = ({"schedule": "zb-h1"}, {"schedule": "zb-v", "vpp": 2, "layout": "E|t|t|L"})
    configs = [
        make_config(model, {"dp": 1, "pp": 2} | one, steps=1, micro_batch=1)
        for model in (LLAMA, GPT2)
        for one in schedules
    ]
    ranks = run_ranks(count_by_action, 2, configs)
    for config, *counted in zip(configs, *ranks, strict=True):
        assert sum(len(layers) for rank in counted for layers in rank.layers) == 2 * 4 + 1
        for rank in counted:
            check(rank, config.training.global_batch_size)


def check(rank: Counted, num_microbatches: int) -> None:
    total = Counter[Op]()
    for action, (linear, attention) in rank.actions:
        layers = rank.layers[action.chunk]
        expected = {
            Op.FORWARD: Counter((TOKENS, inputs, outputs) for outputs, inputs in layers),
            Op.BACKWARD_INPUT: Counter(
                (TOKENS, outputs, inputs) for outputs, inputs in layers
            ),
            Op.BACKWARD_WEIGHT: Counter(
                (outputs, TOKENS, inputs) for outputs, inputs in layers
            ),
        }
        assert linear == expected.get(action.op, Counter()), action
        has_attention = action.op in (Op.FORWARD, Op.BACKWARD_INPUT) and len(layers) >= 4
        assert {"backward" in name for name in attention} == (
            {action.op is Op.BACKWARD_INPUT} if has_attention else set()
        ), action
        total[action.op] += flops(linear)
    every = [layer for layers in rank.layers for layer in layers]
    assert all(TOKENS not in layer for layer in every), (
        "a product's kind is known by its shape"
    )
    forward = (
        sum(2 * TOKENS * outputs * inputs for outputs, inputs in every) * num_microbatches
    )
    assert (
        total[Op.FORWARD]
        == total[Op.BACKWARD_INPUT]
        == total[Op.BACKWARD_WEIGHT]
        == forward
    )
    assert sum(total.values()) == 3 * forward, "nothing is computed twice"
