"""Ranks with gradients that are not finite, as bits in sums of fp64 numbers."""

import pytest
import torch

from megatron_ray.commands import mark_of, marked_ranks, num_marks
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.training.session import build
from tests.support.parity import LLAMA, make_config


@pytest.mark.parametrize("ranks", [(), (0,), (47,), (48,), (0, 1, 47, 48, 95, 96, 200)])
def test_marks_of_ranks_are_exact_in_a_sum(ranks: tuple[int, ...]) -> None:
    total = torch.zeros(num_marks(201), dtype=torch.float64)
    for rank in ranks:
        index, bit = mark_of(rank)
        total[index] += bit
    assert marked_ranks(total.tolist()) == ranks


def test_all_ranks_of_a_number_fit() -> None:
    total = [0.0] * num_marks(96)
    assert len(total) == 2
    for rank in range(96):
        index, bit = mark_of(rank)
        total[index] += bit
    assert marked_ranks(total) == tuple(range(96))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("grad_reduce_in_fp32", [True, False])
def test_one_gradient_that_is_not_finite_is_noticed_in_its_step(
    value: float, grad_reduce_in_fp32: bool
) -> None:
    rule = {"when": "not_finite", "action": "stop", "before_reduction": True}
    fields = make_config(LLAMA, {"dp": 1}, steps=1, precision="bf16").model_dump()
    fields["training"] |= {"rules": [rule], "grad_reduce_in_fp32": grad_reduce_in_fp32}
    model, _ = build(TrainConfig.from_mapping(fields), ParallelMesh.single("cpu"))
    flat = model.parameter_groups[0].buffers.gradients

    def noticed(element: float) -> bool:
        model.begin_step()
        flat.zero_()
        flat[flat.numel() // 2] = element
        for slot in model.sink.slots.values():
            model.parameter_groups[0].reducer.ready(slot)
        model.finish_reductions()
        result = model.not_finite_gradients()
        assert result is not None
        return bool(result)

    largest = torch.finfo(flat.dtype).max
    assert [noticed(largest), noticed(value), noticed(1.0)] == [False, True, False]
