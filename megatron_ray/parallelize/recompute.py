"""Recomputes activations in the backward pass instead of saving them.

Owns: recomputed regions, and the parts of a model that they cover. Must not know:
schedules, groups.

There are three methods. `recomputed` saves a region's inputs and runs it again (Chen et
al. 2016); `saved_outputs` saves the outputs of some of its operations besides, which do
not run again; `discard_output` saves a small module's inputs and frees its output. A region
is a pure function of its inputs, including random numbers (rng.py), so the second run
equals the first bit for bit. Weight gradients are delivered to slots in the backward
pass only, once per microbatch, however often the forward runs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ray.config.training import RecomputeConfig
from megatron_ray.models.block import Block, RunBlocks, run_sequentially
from megatron_ray.models.forward_context import ForwardContext
from megatron_ray.models.gpt import GPT
from megatron_ray.ops.autograd import AutogradFunction
from megatron_ray.ops.backward import Backward
from megatron_ray.parallelize.discard_output import (
    detached_leaves,
    discard_output,
    leaf_grads,
    needs_grad,
)
from megatron_ray.parallelize.replaced_forward import replace_forward
from megatron_ray.parallelize.saved_operations import save_outputs
from megatron_ray.parallelize.saved_outputs import OutputSaver


def apply_recompute(model: GPT, config: RecomputeConfig) -> None:
    """Applies the config's recomputation to a model."""
    if config.granularity == "full":
        model.run_blocks = _run_blocks(config)
    if config.granularity == "operations":
        savers = dict[nn.Module, OutputSaver]()
        for block in model.blocks:
            savers[block] = save_outputs(block, config)
        model.run_blocks = partial(_run_around_saved_outputs, savers)
    for block in model.blocks:
        for name in config.chosen_modules:
            _MODULES[name](block)


# ---- regions that are kept as their inputs


def recomputed(
    run: Callable[..., Tensor],
    *inputs: Tensor | None,
    first: Callable[..., Tensor] | None = None,
    again: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Returns run(*inputs), and saves only the inputs for the backward pass.

    `first` and `again` compute the same as `run` and replace it in the forward and in
    the backward pass, for runs with different side effects. `run` must be a function of
    its inputs alone; everything that needs a gradient must be an input or a parameter.
    """
    if not needs_grad(inputs):
        # Autograd would skip such a region, and its parameters would get no gradients, so
        # it runs without recomputation.
        return run(*inputs)
    return _Recomputed.apply(first or run, again or run, *inputs)


class _Recomputed(AutogradFunction[Tensor]):
    @staticmethod
    def forward(
        ctx: Any,
        first: Callable[..., Tensor],
        again: Callable[..., Tensor],
        *inputs: Tensor | None,
    ) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(*inputs)
        # Autograd does not record inside a function's forward.
        return first(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = detached_leaves(ctx.saved_tensors)
        # Builds the region's graph, from detached inputs to its output.
        with torch.enable_grad():
            second_run = Backward(ctx.again(*inputs))
        second_run.run(grad)
        return None, None, *leaf_grads(inputs)


# ---- whole layers


def _run_blocks(config: RecomputeConfig) -> RunBlocks:
    assert config.num_layers is not None
    if config.method == "uniform":
        return partial(_run_in_chunks, config.num_layers)
    return partial(_run_first_recomputed, config.num_layers)


def _run_in_chunks(
    length: int, blocks: Iterable[nn.Module], hidden_TH: Tensor, context: ForwardContext
) -> Tensor:
    """Recomputes all layers in chunks of `length`, saving the input of each chunk."""
    stage_blocks = list(blocks)
    for start in range(0, len(stage_blocks), length):
        chunk = stage_blocks[start : start + length]
        hidden_TH = _recomputed_blocks(chunk, hidden_TH, context)
    return hidden_TH


def _run_first_recomputed(
    count: int, blocks: Iterable[nn.Module], hidden_TH: Tensor, context: ForwardContext
) -> Tensor:
    """Recomputes the first `count` layers separately."""
    for index, block in enumerate(blocks):
        if index < count:
            hidden_TH = _recomputed_blocks([block], hidden_TH, context)
        else:
            hidden_TH = block(hidden_TH, context, None)
    return hidden_TH


def _recomputed_blocks(
    blocks: Sequence[nn.Module], hidden_TH: Tensor, context: ForwardContext
) -> Tensor:
    # Other passes save no activations, and their mode must not change.
    if not context.mode.is_training:
        return run_sequentially(blocks, hidden_TH, context)
    return recomputed(
        lambda hidden_TH: run_sequentially(blocks, hidden_TH, context),
        hidden_TH,
        first=lambda hidden_TH: run_sequentially(
            blocks, hidden_TH, context.for_first_run()
        ),
        again=lambda hidden_TH: _run_without_output(
            blocks, hidden_TH, context.for_recompute()
        ),
    )


def _run_without_output(
    blocks: Sequence[nn.Module], hidden_TH: Tensor, context: ForwardContext
) -> Tensor:
    """Runs blocks for their gradients only.

    Nothing in the region reads the output of the last block, so its last product and,
    under tensor parallelism, its communication are skipped.
    """
    hidden_TH = run_sequentially(blocks[:-1], hidden_TH, context)
    output: Tensor = blocks[-1](hidden_TH, context.without_output(), None)
    return output


# ---- layers without some of their operations


def _run_around_saved_outputs(
    savers: Mapping[nn.Module, OutputSaver],
    blocks: Iterable[nn.Module],
    hidden_TH: Tensor,
    context: ForwardContext,
) -> Tensor:
    """Recomputes every layer by its saver."""
    if not context.mode.is_training:
        return run_sequentially(blocks, hidden_TH, context)
    first = context.for_first_run()
    again = context.for_recompute().without_output()
    for block in blocks:
        hidden_TH = savers[block].recomputed(
            partial(run_sequentially, [block], context=context),
            partial(run_sequentially, [block], context=first),
            partial(run_sequentially, [block], context=again),
            hidden_TH,
        )
    return hidden_TH


# ---- some modules of every layer


def _recompute_core_attention(block: Block) -> None:
    attention = block.attention
    # Scores and probabilities are recomputed; q, k and v are saved.
    attention.core = _RecomputedCore(attention.core)
    if attention.core_with_dropout is not None:
        attention.core_with_dropout = _RecomputedCore(attention.core_with_dropout)


class _RecomputedCore(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *arguments: object
    ) -> Tensor:
        """Runs the core; `arguments` need no gradient."""

        def run(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
            output: Tensor = self.core(q_BNSD, k_BGSD, v_BGSD, *arguments)
            return output

        return recomputed(run, q_BNSD, k_BGSD, v_BGSD)


def _recompute_mlp(block: Block) -> None:
    if block.mlp is None:
        return
    # Nothing in the region reads the output of the MLP's last product.
    run = block.mlp.forward

    def forward(
        x_TH: Tensor, residual_TH: Tensor | None, *, is_output_needed: bool = True
    ) -> Tensor:
        again = partial(run, is_output_needed=False)
        return recomputed(run, x_TH, residual_TH, again=again)

    replace_forward(block.mlp, forward)


def _recompute_moe(block: Block) -> None:
    if block.moe is None:
        return
    run = block.moe.forward

    def forward(
        x_TH: Tensor, residual_TH: Tensor | None, context: ForwardContext
    ) -> Tensor:
        if not context.mode.is_training:
            return run(x_TH, residual_TH, context)
        return recomputed(
            partial(run, context=context),
            x_TH,
            residual_TH,
            first=partial(run, context=context.for_first_run()),
            again=partial(run, context=context.for_recompute()),
        )

    replace_forward(block.moe, forward)


def _discard_norm_outputs(block: Block) -> None:
    # The consumer of a norm is the first product of the following half.
    discard_output(block.attention_norm, block.attention)
    feed_forward = block.mlp or block.moe
    assert feed_forward is not None
    discard_output(block.mlp_norm, feed_forward)


def _discard_activations(block: Block) -> None:
    if block.mlp is not None:
        discard_output(block.mlp.activation, block.mlp.down)
    if block.moe is not None:
        discard_output(block.moe.experts.activation, block.moe.experts.down)
        if block.moe.shared is not None:
            discard_output(block.moe.shared.activation, block.moe.shared.down)


_MODULES: dict[str, Callable[[Block], None]] = {
    "core_attention": _recompute_core_attention,
    "norm": _discard_norm_outputs,
    "activation": _discard_activations,
    "mlp": _recompute_mlp,
    "moe": _recompute_moe,
}
