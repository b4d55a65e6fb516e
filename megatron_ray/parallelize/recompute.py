"""Activations that the backward pass computes again instead of keeping them (Chen et
al. 2016).

Owns: how, and with which parts of a model.

Two ways. `recomputed` keeps a region's inputs and runs it again. `discard_output` frees
the output of a small module once its consumer has used it and writes it again into the
same memory before the consumer's backward reads it. Nothing of a region's forward but
its inputs decides what it computes, random numbers included (rng.py), so the second run
equals the first bit for bit. Weight gradients go to their slots in the backward only,
once, whoever ran the forward how often. Must not know: schedules, groups.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.config.training import RecomputeConfig
from megatron_ray.models.attention import ForwardContext
from megatron_ray.models.block import Block, run_sequentially
from megatron_ray.models.gpt import GPT
from megatron_ray.ops.backward import Backward
from megatron_ray.tensor_parallel.layers import RowParallelLinear


def apply_recompute(model: GPT, config: RecomputeConfig) -> None:
    """Puts recomputation into a model as the config asks for it."""
    if config.granularity == "full":
        assert config.num_layers is not None
        model.through = (
            _Chunks(config.num_layers)
            if config.method == "uniform"
            else _FirstLayers(config.num_layers)
        )
    for block in model.blocks:
        for name in config.chosen_modules:
            _MODULES[name](block)


# ---- whole layers


class _Chunks:
    """Chunks of `length` layers, each kept as its input."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(
        self, blocks: Iterable[nn.Module], hidden_TH: Tensor, positions: ForwardContext
    ) -> Tensor:
        row = list(blocks)
        for start in range(0, len(row), self._length):
            hidden_TH = _layers(row[start : start + self._length], hidden_TH, positions)
        return hidden_TH


class _FirstLayers:
    """The first `count` layers, each kept as its input, and the others as they are."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __call__(
        self, blocks: Iterable[nn.Module], hidden_TH: Tensor, positions: ForwardContext
    ) -> Tensor:
        for place, block in enumerate(blocks):
            hidden_TH = (
                _layers([block], hidden_TH, positions)
                if place < self._count
                else block(hidden_TH, positions, None)
            )
        return hidden_TH


def _layers(
    blocks: Sequence[nn.Module], hidden_TH: Tensor, positions: ForwardContext
) -> Tensor:
    def run(positions: ForwardContext, hidden_TH: Tensor) -> Tensor:
        return run_sequentially(blocks, hidden_TH, positions)

    first = partial(run, positions)
    again = partial(run, _unheard(positions))
    return recomputed(first, hidden_TH, again=again, last=_last_product(blocks[-1]))


def _unheard(positions: ForwardContext) -> ForwardContext:
    """For a second run, of whose choices nobody is to hear again."""
    return replace(positions, on_route=None)


# ---- some modules of every layer


def _core_attention(block: Block) -> None:
    attention = block.attention
    attention.core = _RecomputedCore(attention.core)
    if attention.core_with_dropout is not None:
        attention.core_with_dropout = _RecomputedCore(attention.core_with_dropout)


class _RecomputedCore(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, about: object
    ) -> Tensor:
        return recomputed(lambda q, k, v: self.core(q, k, v, about), q_BNSD, k_BGSD, v_BGSD)


def _mlp(block: Block) -> None:
    if block.mlp is None:
        return
    plain = block.mlp.forward
    last = _last_product(block)

    def forward(x_TH: Tensor, residual_TH: Tensor | None) -> Tensor:
        if residual_TH is None:
            return recomputed(lambda x: plain(x, None), x_TH, last=last)
        return recomputed(plain, x_TH, residual_TH, last=last)

    _replace_forward(block.mlp, forward)


def _moe(block: Block) -> None:
    if block.moe is None:
        return
    plain = block.moe.forward

    def run(
        positions: ForwardContext, x_TH: Tensor, residual_TH: Tensor | None = None
    ) -> Tensor:
        output: Tensor = plain(x_TH, residual_TH, positions)
        return output

    def forward(
        x_TH: Tensor, residual_TH: Tensor | None, positions: ForwardContext
    ) -> Tensor:
        inputs = [x_TH] if residual_TH is None else [x_TH, residual_TH]
        return recomputed(
            partial(run, positions), *inputs, again=partial(run, _unheard(positions))
        )

    _replace_forward(block.moe, forward)


def _norm(block: Block) -> None:
    discard_output(block.attention_norm, block.attention)
    second = block.mlp if block.moe is None else block.moe
    assert second is not None
    discard_output(block.mlp_norm, second)


def _activation(block: Block) -> None:
    inside = [block.mlp] if block.moe is None else [block.moe.experts, block.moe.shared]
    for part in inside:
        if part is not None:
            discard_output(part.activation, part.down)


_MODULES: dict[str, Callable[[Block], None]] = {
    "core_attention": _core_attention,
    "norm": _norm,
    "activation": _activation,
    "mlp": _mlp,
    "moe": _moe,
}


def _replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Not a module around the module: names of parameters are those of the table."""
    module.forward = forward


def _last_product(block: nn.Module) -> RowParallelLinear | None:
    """The product that makes the output of a block's MLP; experts have none such."""
    assert isinstance(block, Block)
    return (
        block.mlp.down
        if block.mlp is not None and isinstance(block.mlp.down, RowParallelLinear)
        else None
    )


# ---- regions kept as their inputs


def recomputed(
    run: Callable[..., Tensor],
    *inputs: Tensor,
    again: Callable[..., Tensor] | None = None,
    last: RowParallelLinear | None = None,
) -> Tensor:
    """run(*inputs), of which only the inputs are kept for the backward pass.

    `again` computes the same in the backward pass, where that is to be told apart.
    `last`: the layer that makes the output and of which nothing in the region reads the
    output; its second product, and under tensor parallelism the communication of it,
    are spared. `run` must be a function of its inputs alone; everything that needs a
    gradient is an input, or a parameter.
    """
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return run(*inputs)
    return _Recomputed.apply(run, again or run, last, *inputs)  # type: ignore[no-any-return, no-untyped-call]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Tensor],
        again: Callable[..., Tensor],
        last: RowParallelLinear | None,
        *inputs: Tensor,
    ) -> Tensor:

        ctx.run = again
        ctx.last = last
        ctx.save_for_backward(*inputs)
        return run(*inputs)  # autograd records nothing inside a function's forward

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = _leaves(ctx.saved_tensors)
        with torch.enable_grad(), _unread(ctx.last):
            again = Backward(ctx.run(*inputs))
        again.run(grad)
        return None, None, None, *(tensor.grad for tensor in inputs)


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]


@contextmanager
def _unread(layer: RowParallelLinear | None) -> Iterator[None]:
    if layer is None:
        yield
        return
    plain = layer.forward
    _replace_forward(layer, partial(plain, is_output_needed=False))
    try:
        yield
    finally:
        _replace_forward(layer, plain)


# ---- outputs given back


def discard_output(producer: nn.Module, consumer: nn.Module) -> None:
    """Frees the output of `producer` after `consumer`, the only one to read it, has
    run; it is there again for the consumer's backward.

    Costs one run of the producer and one copy of its output. The output must have
    memory of its own.
    """
    plain = producer.forward
    under_way = list[Any]()

    def produce(*inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not any(
            tensor.requires_grad for tensor in inputs
        ):
            return plain(*inputs)  # type: ignore[no-any-return]
        output: Tensor = DiscardedOutput.apply(plain, *inputs)  # type: ignore[no-untyped-call]
        under_way.append((output.grad_fn, output.untyped_storage()))
        return output

    def after(_: nn.Module, __: Any, consumed: Tensor) -> None:
        if under_way:
            node, memory = under_way.pop()
            size = memory.nbytes()
            memory.resize_(0)
            assert consumed.grad_fn is not None
            # Of the node and not of the tensor, whose hooks come before: under ZeRO-3
            # one of them gathers the weights.
            consumed.grad_fn.register_prehook(lambda _: _write_again(node, memory, size))

    _replace_forward(producer, produce)
    consumer.register_forward_hook(after)


class DiscardedOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*inputs)
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, again = ctx.again
        ctx.again = None
        again.run(grad)
        return None, *(tensor.grad for tensor in inputs)


def _write_again(node: Any, memory: torch.UntypedStorage, size: int) -> None:
    """Runs the producer once more, for its graph and for its output, which goes where
    the consumer has it from.
    """
    inputs = _leaves(node.saved_tensors)
    with torch.enable_grad():
        output = node.run(*inputs)
        node.again = inputs, Backward(output)
    memory.resize_(size)
    memory.copy_(output.untyped_storage())
