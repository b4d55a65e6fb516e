"""The layers of a mixture of experts whose weights and state are cut or counted by
rank.

Owns: the router's product, the experts' grouped products, the balancing bias. Weight
gradients go to slots, as everywhere. Must not know: which expert a token goes to and
why.

Shapes: T tokens, R rows that lie expert by expert, H hidden, E experts (of this rank,
in grouped products), I inputs, O outputs.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.dtypes import to_fp32
from megatron_ray.ops.grad_slots import SlottedModule, deliver_linear
from megatron_ray.ops.matmul import (
    Counts,
    forward_product,
    grouped_forward_product,
    grouped_input_grad_product,
    grouped_weight_grad_product,
    input_grad_product,
)


class RouterLinear(SlottedModule):
    """One logit per token and expert, in fp32 whatever the type of the activations;
    whole on every rank.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        group: Group,
        sequence_parallel: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(group, sequence_parallel)
        self.weight = nn.Parameter(torch.empty(num_experts, width, dtype=dtype))

    def forward(self, x_TH: Tensor) -> Tensor:
        return _RouterLinear.apply(x_TH, self.weight, self)  # type: ignore[no-any-return, no-untyped-call]


class _RouterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: RouterLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module = module
        return forward_product(to_fp32(x), to_fp32(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_weight = deliver_linear(ctx.module, to_fp32(x), grad)
        return input_grad_product(grad, to_fp32(weight)).to(x.dtype), grad_weight, None


class GroupedLinear(SlottedModule):
    """Y = X W_e^T for the rows of each expert e, with the weights of this rank's
    experts one after another: [R, I] -> [R, O].
    """

    def __init__(
        self, num_experts: int, inputs: int, outputs: int, *, dtype: torch.dtype
    ) -> None:
        super().__init__(None, sequence_parallel=False)
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts * outputs, inputs, dtype=dtype))

    def forward(self, inputs_RI: Tensor, counts: Counts) -> Tensor:
        return _Grouped.apply(inputs_RI, self.weight, counts, self)  # type: ignore[no-any-return, no-untyped-call]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, counts: Counts, module: GroupedLinear
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)

        ctx.counts = counts
        ctx.module = module
        return grouped_forward_product(
            inputs, weight.view(module.num_experts, -1, weight.shape[1]), counts
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        counts = ctx.counts
        module = ctx.module
        grad = grad.contiguous()
        grad_inputs = grouped_input_grad_product(
            grad, weight.view(module.num_experts, -1, weight.shape[1]), counts
        )
        grad_weight = None
        if weight.requires_grad:
            slot = module.slot("weight")
            if slot is None:
                grad_weight = grouped_weight_grad_product(
                    grad, inputs, counts, module.num_experts
                ).flatten(0, 1)
            else:
                slot.grouped(inputs, grad, counts, module.num_experts)
        return grad_inputs, grad_weight, None, None


class ExpertBias(nn.Module):
    """What is added to the scores by which experts are chosen, so that they get equally
    many tokens (Wang et al. 2024, Auxiliary-loss-free load balancing). The same on
    every rank; no parameter, it has no gradient, but part of a checkpoint.
    """

    def __init__(self, num_experts: int, rate: float) -> None:
        """`rate`: what a step moves a bias by."""
        super().__init__()
        self.rate = rate
        self.value: Tensor
        self.tokens: Tensor
        self.register_buffer("value", torch.zeros(num_experts))
        self.register_buffer("tokens", torch.zeros(num_experts))

    def allocate(self, device: torch.device) -> None:
        """Zeros in real memory, for a model that was built on `meta`."""
        self.value, self.tokens = (
            torch.zeros(buffer.shape, device=device) for buffer in (self.value, self.tokens)
        )

    def count(self, tokens_E: Tensor) -> None:
        """Adds a microbatch's tokens per expert."""
        self.tokens += tokens_E


@torch.no_grad()
def update_expert_biases(
    biases: Collection[ExpertBias], token_group: Group, dp_group: Group
) -> None:
    """One step's move of every bias, by the sign of mean - tokens over all ranks that
    saw tokens (tp x cp x dp); forgets the counts.
    """
    if not biases:
        return
    tokens = torch.stack([bias.tokens for bias in biases])
    collectives.all_reduce(collectives.all_reduce(tokens, token_group), dp_group)
    moves = torch.sign(tokens.mean(1, keepdim=True) - tokens)
    for bias, move in zip(biases, moves, strict=True):
        bias.value.add_(move, alpha=bias.rate)
        bias.tokens.zero_()
