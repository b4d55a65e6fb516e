"""Computes the layers of a mixture of experts: router, expert products, balancing bias.

Weight gradients are accumulated in slots. Must not know: how tokens are routed.

Shapes: T tokens, R rows sorted by expert, H hidden, E experts (of this rank, in grouped
products), I inputs, O outputs.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.dtypes import to_fp32
from megatron_ray.ops.grad_slots import SlottedModule, deliver_weight_grad
from megatron_ray.ops.matmul import (
    Counts,
    forward_product,
    input_grad_product,
)
from megatron_ray.ops.products import (
    PLAIN_GROUPED,
    GroupedMultiplication,
    GroupedProducts,
)

Shape = tuple[int, ...]


class RouterLinear(SlottedModule):
    """One logit per token and expert: [T, H] -> [T, E]; replicated on every rank.

    The product is in fp32 for any type of activations.
    """

    def __init__(self, weight_shape: Shape, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(weight_shape, dtype=dtype))

    def forward(self, x_TH: Tensor) -> Tensor:
        """Returns the logits of this rank's tokens."""
        return _RouterLinear.apply(x_TH, self.weight, self)


class _RouterLinear(AutogradFunction[Tensor]):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: RouterLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module = module
        # In fp32, because rounding to bf16 could change the choice between experts with
        # similar logits.
        return forward_product(to_fp32(x), to_fp32(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_weight = deliver_weight_grad(ctx.module, to_fp32(x), grad)
        grad_x = input_grad_product(grad, to_fp32(weight)).to(x.dtype)
        return grad_x, grad_weight, None


class GroupedLinear(SlottedModule):
    """Y = X W_e^T for the rows of each expert e: [R, I] -> [R, O].

    The weights of this rank's experts are concatenated: [E x O, I].
    """

    def __init__(
        self, weight_shape: Shape, num_experts: int, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.multiplication: GroupedMultiplication = PLAIN_GROUPED
        self.weight = nn.Parameter(torch.empty(weight_shape, dtype=dtype))

    def forward(self, inputs_RI: Tensor, counts: Counts) -> Tensor:
        """Returns the outputs; `counts` are the rows of each expert on this rank."""
        return _Grouped.apply(inputs_RI, self.weight, counts, self)


class _Grouped(AutogradFunction[Tensor]):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, counts: Counts, module: GroupedLinear
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.counts = counts
        ctx.module = module
        products = module.multiplication.begin_pass()
        ctx.products = products
        return products.forward(inputs, _by_expert(weight, module.num_experts), counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        module: GroupedLinear = ctx.module
        products: GroupedProducts = ctx.products
        grad = grad.contiguous()
        grad_inputs = products.input_grad(
            grad, _by_expert(weight, module.num_experts), ctx.counts
        )
        grad_weight = None
        if weight.requires_grad:
            grad_weight = _deliver_grouped_grad(module, inputs, grad, ctx.counts, products)
        return grad_inputs, grad_weight, None, None


def _deliver_grouped_grad(
    module: GroupedLinear,
    inputs: Tensor,
    grad: Tensor,
    counts: Counts,
    products: GroupedProducts,
) -> Tensor | None:
    slot = module.slot("weight")
    num_experts = module.num_experts
    if slot is None:
        return products.weight_grad(grad, inputs, counts, num_experts).flatten(0, 1)
    slot.contribute(
        partial(_accumulate_grouped, inputs, grad, counts, num_experts, products)
    )
    return None


def _accumulate_grouped(
    inputs: Tensor,
    grad: Tensor,
    counts: Counts,
    num_experts: int,
    products: GroupedProducts,
    main_grad: Tensor,
    *,
    fresh: bool,
) -> None:
    main_EOI = _by_expert(main_grad, num_experts)
    products.accumulate_weight_grad(main_EOI, grad, inputs, counts, fresh=fresh)


def _by_expert(weight: Tensor, num_experts: int) -> Tensor:
    """Views a weight [E x O, I] as [E, O, I]."""
    return weight.view(num_experts, -1, weight.shape[1])


class ExpertBias(nn.Module):
    """A bias on routing scores that balances the load of experts.

    Each step moves an expert's bias by `rate` towards equal numbers of tokens (Wang et
    al. 2024, Auxiliary-loss-free load balancing). It is the same on every rank. It is a
    buffer without gradient and part of checkpoints.
    """

    def __init__(self, num_experts: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.value: Tensor
        self.tokens: Tensor
        self.register_buffer("value", torch.zeros(num_experts))
        self.register_buffer("tokens", torch.zeros(num_experts))

    def allocate(self, device: torch.device) -> None:
        """Replaces the buffers of a model built on `meta` by zeros in real memory."""
        self.value = torch.zeros(self.value.shape, device=device)
        self.tokens = torch.zeros(self.tokens.shape, device=device)

    def count(self, tokens_E: Tensor) -> None:
        """Adds a microbatch's tokens per expert."""
        self.tokens += tokens_E


@torch.no_grad()
def update_expert_biases(
    biases: Collection[ExpertBias],
    token_group: Group,
    dp_group: Group,
    skip: Tensor | None = None,
) -> None:
    """Moves every bias by rate x sign(mean - tokens) and resets the counts.

    Tokens are summed over all ranks with different tokens: tp x cp x dp. If `skip` is 1
    the biases stay as they are.
    """
    if not biases:
        return
    tokens = torch.stack([bias.tokens for bias in biases])
    # One collective for all biases of the model on each of the two groups.
    collectives.all_reduce(tokens, token_group)
    collectives.all_reduce(tokens, dp_group)
    # Only the sign counts, so that the size of a batch does not matter.
    moves = torch.sign(tokens.mean(1, keepdim=True) - tokens)
    if skip is not None:
        moves *= 1 - skip
    for bias, move in zip(biases, moves, strict=True):
        bias.value.add_(move, alpha=bias.rate)
        bias.tokens.zero_()
