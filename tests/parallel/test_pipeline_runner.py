"""The runner on real ranks: every schedule gives one process' losses and gradients, and
does exactly what is on its list.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ray.distributed.interleaver import Interleaver
from megatron_ray.ops.weight_grad import GradSlot, WeightGradSink
from megatron_ray.pipeline_parallel.runner import PipelineRunner, Transfer
from megatron_ray.pipeline_parallel.schedules.actions import Action, StageMap
from megatron_ray.pipeline_parallel.schedules.lowering import lower
from megatron_ray.pipeline_parallel.schedules.orders import (
    ScheduleName,
    compute_orders,
    stage_map,
)
from megatron_ray.tensor_parallel.group import TensorParallel
from megatron_ray.tensor_parallel.layers import ColumnParallelLinear

pytestmark = pytest.mark.parallel
Run = Callable[..., list[Any]]
WIDTH = 6
TOKENS = 5
CPU = torch.device("cpu")


class Part(nn.Module):
    """A layer whose weight gradient goes through the sink; the last one ends in a loss."""

    def __init__(self, stage: int, last: bool) -> None:
        super().__init__()
        self.linear = ColumnParallelLinear(
            (WIDTH, WIDTH), bias=True, tp=TensorParallel(), dtype=torch.float32
        )
        generator = torch.Generator().manual_seed(stage)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        self.last = last

    def forward(self, received: Tensor | None, microbatch: int) -> Tensor:
        if received is None:
            received = torch.randn(
                TOKENS, WIDTH, generator=torch.Generator().manual_seed(100 + microbatch)
            )
        hidden = torch.tanh(self.linear(received))
        return hidden.square().sum() if self.last else hidden


def with_slots(
    parts: dict[int, Part], on_ready: Callable[[GradSlot], None]
) -> tuple[WeightGradSink, dict[str, Tensor]]:
    sink = WeightGradSink(on_ready)
    gradients = dict[str, Tensor]()
    for stage, part in parts.items():
        for name, parameter in part.linear.named_parameters():
            gradients[f"{stage}.{name}"] = torch.full_like(parameter, float("nan"))
            part.linear.slots[name] = sink.register(
                f"{stage}.{name}", gradients[f"{stage}.{name}"]
            )
    return sink, gradients


def piped(
    rank: int,
    world_size: int,
    name: ScheduleName,
    vpp: int,
    count: int,
    steps: int,
    in_pairs: bool = False,
) -> tuple[Any, ...]:
    """Losses, gradients, whether the trace is the list, and the parameters in the order
    in which they became ready.
    """
    stages = stage_map(name, world_size, vpp)
    actions = lower(
        compute_orders(name, world_size, count, vpp, in_pairs=in_pairs), stages
    )[rank]
    numbers = [stages.stage(rank, chunk) for chunk in range(vpp)]
    parts = {stage: Part(stage, stage + 1 == stages.num_stages) for stage in numbers}
    ready: list[str] = []
    trace: list[Action] = []
    sink, gradients = with_slots(parts, lambda slot: ready.append(slot.name))
    transfer = Transfer((TOKENS, WIDTH), torch.float32, CPU)
    runner = PipelineRunner(
        actions,
        stages,
        list(parts.values()),
        dist.group.WORLD,
        transfer,
        Interleaver(transfer.device),
        sink,
        trace.append,
    )
    for _ in range(steps):
        ready.clear()
        trace.clear()
        sink.begin_step()
        losses = runner.step()
    return [float(loss) for loss in losses], gradients, trace == actions, ready


def whole(num_stages: int, count: int) -> tuple[list[float], dict[str, Tensor]]:
    parts = {stage: Part(stage, stage + 1 == num_stages) for stage in range(num_stages)}
    sink, gradients = with_slots(parts, lambda slot: None)
    losses = []
    for microbatch in range(count):
        sink.begin_microbatch(last=False)
        hidden: Tensor | None = None
        for part in parts.values():
            hidden = part(hidden, microbatch)
        assert hidden is not None
        hidden.backward()
        losses.append(float(hidden.detach()))
    return losses, gradients


@pytest.mark.parametrize(
    ("name", "pp", "vpp", "count", "in_pairs"),
    [
        ("gpipe", 2, 1, 3, False),
        ("1f1b", 2, 1, 4, False),
        ("1f1b", 4, 1, 6, False),
        ("1f1b", 4, 1, 2, False),
        ("interleaved", 2, 2, 4, False),
        ("interleaved", 2, 3, 5, False),
        ("interleaved", 4, 2, 6, False),
        ("zb-h1", 2, 1, 4, False),
        ("zb-h1", 4, 1, 7, False),
        ("zb-v", 2, 2, 3, False),
        ("zb-v", 4, 2, 9, False),
        ("1f1b", 2, 1, 5, True),
        ("1f1b", 4, 1, 9, True),
        ("interleaved", 2, 2, 7, True),
    ],
)
def test_every_schedule_is_one_process(
    run_ranks: Run, name: ScheduleName, pp: int, vpp: int, count: int, in_pairs: bool
) -> None:
    losses, gradients = whole(pp * vpp, count)
    by_rank = run_ranks(piped, pp, name, vpp, count, 2, in_pairs)
    at, _ = stage_map(name, pp, vpp).rank_and_chunk(pp * vpp - 1)
    assert [ranks_losses for ranks_losses, *_ in by_rank] == [
        losses if rank == at else [] for rank in range(pp)
    ]
    for _, own, follows, ready in by_rank:
        assert follows, "the trace is the list"
        assert sorted(ready) == sorted(own), "each gradient was ready once"
        for parameter, gradient in own.items():
            assert torch.equal(gradient, gradients.pop(parameter)), parameter
    assert not gradients


def test_stages_of_one_rank_hand_over_without_a_group() -> None:
    stages = StageMap(1, 3)
    actions = lower(compute_orders("interleaved", 1, 4, 3), stages)[0]
    parts = {stage: Part(stage, stage == 2) for stage in range(3)}
    sink, gradients = with_slots(parts, lambda slot: None)
    runner = PipelineRunner(
        actions,
        stages,
        list(parts.values()),
        None,
        Transfer((1,), torch.float32, CPU),
        Interleaver(CPU),
        sink,
    )
    losses, expected = whole(3, 4)
    assert [float(loss) for loss in runner.step()] == losses
    assert all(
        torch.equal(gradients[name], gradient) for name, gradient in expected.items()
    )


def test_weight_gradients_apart_need_a_sink() -> None:
    actions = lower(compute_orders("zb-h1", 1, 1), StageMap(1))[0]
    runner = PipelineRunner(
        actions,
        StageMap(1),
        [Part(0, True)],
        None,
        Transfer((1,), torch.float32, CPU),
        Interleaver(CPU),
    )
    with pytest.raises(ValueError, match="needs weight_grads, which can defer it"):
        runner.step()
