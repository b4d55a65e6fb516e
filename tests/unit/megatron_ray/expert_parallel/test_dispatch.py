"""Dispatch on one rank: rows lie expert by expert, and come back with their weights;
gradients are those of a plain loop.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ray.distributed.interleaver import Interleaver
from megatron_ray.expert_parallel.dispatch import (
    AllGatherDispatcher,
    AllToAllDispatcher,
    Capacity,
)
from megatron_ray.expert_parallel.layers import GroupedLinear
from megatron_ray.ops import matmul
from megatron_ray.ops.matmul import Library

CPU = torch.device("cpu")
TOKENS = 7
EXPERTS = 4
WIDTH = 8
CHOICES = torch.tensor([[0, 3], [3, 1], [1, 0], [3, 0], [0, 1], [3, 1], [1, 3]])
"""No token chooses expert 2."""


def exchanging(num_experts: int) -> AllToAllDispatcher:
    return AllToAllDispatcher(num_experts, None, None, Interleaver(CPU))


def gathering(num_experts: int) -> AllGatherDispatcher:
    return AllGatherDispatcher(num_experts, None, None)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((TOKENS, WIDTH), (TOKENS, 2), (EXPERTS * WIDTH, WIDTH))
    x, weights, matrices = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in shapes
    )
    return x, weights, matrices


def expected(x: Tensor, weights: Tensor, matrices: Tensor, experts: Tensor) -> Tensor:
    by_expert = matrices.view(EXPERTS, WIDTH, WIDTH)
    rows = []
    for token in range(TOKENS):
        row = torch.zeros(WIDTH)
        for k, expert in enumerate(experts[token].tolist()):
            if expert < EXPERTS:
                row = row + weights[token, k] * (by_expert[expert] @ x[token])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [exchanging, gathering])
@pytest.mark.parametrize(
    "capacity",
    [Capacity(), Capacity(dropless=False), Capacity(dropless=False, rows_per_expert=5)],
    ids=["all", "dropped", "padded"],
)
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(
    kind: Any, capacity: Capacity
) -> None:
    experts = CHOICES.clone()
    if not capacity.dropless:
        experts[2, 1] = experts[5, 0] = EXPERTS
    x, weights, matrices = inputs()
    linear = GroupedLinear((EXPERTS * WIDTH, WIDTH), EXPERTS, dtype=torch.float32)
    linear.weight = torch.nn.Parameter(matrices.detach().clone())
    dispatched = kind(EXPERTS).dispatch(x, experts, capacity)
    counts = [int((experts == expert).sum()) for expert in range(EXPERTS)]
    assert (
        dispatched.counts == 5
        if isinstance(dispatched.counts, int)
        else dispatched.counts.tolist() == counts
    )
    output = dispatched.combine(linear(dispatched.rows_RH, dispatched.counts), weights)
    truth = expected(x, weights, matrices, experts)
    torch.testing.assert_close(output, truth)
    along = torch.linspace(-1, 1, WIDTH)
    measured = torch.autograd.grad((output * along).sum(), (x, weights, linear.weight))
    for grad, true_grad in zip(
        measured,
        torch.autograd.grad((truth * along).sum(), (x, weights, matrices)),
        strict=True,
    ):
        torch.testing.assert_close(grad, true_grad)
    assert measured[2].view(EXPERTS, -1)[2].abs().sum() == 0


def test_rows_of_an_expert_are_in_the_order_of_tokens() -> None:
    x = torch.arange(TOKENS, dtype=torch.float32)[:, None].expand(TOKENS, WIDTH)
    rows = exchanging(EXPERTS).dispatch(x, CHOICES, Capacity()).rows_RH[:, 0].tolist()
    assert rows == [0, 2, 3, 4, 1, 2, 4, 5, 6, 0, 1, 3, 5, 6]


def test_one_kernel_multiplies_as_one_product_per_expert_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CPU the kernel has an implementation too, which nothing else uses: it shows
    that the arguments are right.
    """
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([5, 0, 7, 4])
    x, weight, grad = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((16, 32), (4, 24, 32), (16, 24))
    )

    def products() -> list[Tensor]:
        by: Library = "torch"  # the kernel rounds what it adds to the main gradient
        main = torch.full((4, 24, 32), 7.0)
        for fresh in (True, False):
            matmul.accumulate_grouped_weight_grad(
                main, grad, x, counts, fresh=fresh, library=by
            )
        forward = matmul.grouped_forward_product(x, weight, counts, by)
        return [forward, matmul.grouped_input_grad_product(grad, weight, counts, by), main]

    one_by_one = products()
    monkeypatch.setattr(matmul, "_has_grouped_kernel", lambda *_: True)
    for at_once, one_product in zip(products(), one_by_one, strict=True):
        torch.testing.assert_close(at_once, one_product)
    assert one_by_one[2][1].abs().max() == 0


def test_nobody_may_go_anywhere() -> None:
    x, weights, _ = inputs()
    nowhere = torch.full_like(CHOICES, EXPERTS)
    dispatched = exchanging(EXPERTS).dispatch(x, nowhere, Capacity(dropless=False))
    linear = GroupedLinear((EXPERTS * WIDTH, WIDTH), EXPERTS, dtype=torch.float32)
    output = dispatched.combine(linear(dispatched.rows_RH, dispatched.counts), weights)
    output.sum().backward()
    assert output.abs().sum() == 0
    assert linear.weight.grad is not None
    assert linear.weight.grad.abs().sum() == 0
