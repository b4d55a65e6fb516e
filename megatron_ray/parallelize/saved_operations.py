"""Chooses the operations of a layer whose outputs recomputation saves.

Owns: which modules they are, in the order of `RecomputeConfig.saves_product`. Must not
know: how outputs are saved.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from megatron_ray.config.training import RecomputeConfig
from megatron_ray.context_parallel.all_to_all import UlyssesAttention
from megatron_ray.expert_parallel.dispatch import (
    AllToAllDispatcher,
    Capacity,
    Dispatched,
)
from megatron_ray.models.block import Block
from megatron_ray.models.latent_attention import LatentAttention
from megatron_ray.models.layers import Dispatcher
from megatron_ray.models.mlp import GatedMLP, PlainMLP
from megatron_ray.models.moe.experts import GatedExperts, PlainExperts
from megatron_ray.parallelize.saved_outputs import OutputSaver
from megatron_ray.tensor_parallel.layers import RowParallelLinear


def save_outputs(block: Block, config: RecomputeConfig) -> OutputSaver:
    """Makes the config's operations of a layer save their outputs.

    The layer must be recomputed by the saver that is returned.
    """
    saver = OutputSaver()
    saved = config.saved_operations
    for position, product in enumerate(_products(block)):
        is_summed = isinstance(product, RowParallelLinear) and product.tp.size > 1
        if config.saves_product(position) or (is_summed and "reduce_scatter" in saved):
            _save_product(saver, block, product)
    if "attention" in saved:
        core = block.attention.core
        # Exchanges around it are repeated, since a rank would keep what it receives.
        if isinstance(core, UlyssesAttention):
            core = core.inner
        core.forward = saver.saving(core.forward)
    if "all_to_all" in saved and block.moe is not None:
        dispatcher = block.moe.dispatcher
        if isinstance(dispatcher, AllToAllDispatcher) and dispatcher.ep_group is not None:
            is_read = block.mlp_output_norm is not None
            block.moe.dispatcher = _SavingDispatcher(saver, dispatcher, is_read)
    return saver


def _products(block: Block) -> Iterator[nn.Module]:
    """Yields the products of a layer in the order of the forward pass."""
    attention = block.attention
    if isinstance(attention, LatentAttention):
        if attention.mla.q_lora_rank is None:
            yield attention.q
        else:
            yield attention.q_down
            yield attention.q_up
        yield attention.kv_down
        yield attention.kv_up
    else:
        assert isinstance(attention.qkv, nn.Module)
        yield attention.qkv
    yield attention.o
    if block.mlp is not None:
        yield from _products_of_mlp(block.mlp)
    if block.moe is not None:
        yield block.moe.router
        if block.moe.shared is not None:
            yield from _products_of_mlp(block.moe.shared)
        yield from _products_of_mlp(block.moe.experts)


def _products_of_mlp(
    mlp: GatedMLP | PlainMLP | GatedExperts | PlainExperts,
) -> tuple[nn.Module, nn.Module]:
    if isinstance(mlp, GatedMLP | GatedExperts):
        return mlp.gate_up, mlp.down
    return mlp.up, mlp.down


def _save_product(saver: OutputSaver, block: Block, product: nn.Module) -> None:
    # Nothing reads the output of an MLP's last product in the backward pass, unless it is
    # normed, so it is neither kept nor computed again.
    is_last = block.mlp is not None and product is block.mlp.down
    if is_last and block.mlp_output_norm is None:
        return
    # Dropout works in place, on the output of a norm if there is one.
    is_dropped = block.attention_dropout is not None and block.attention_output_norm is None
    is_changed = is_dropped and product is block.attention.o
    product.forward = saver.saving(product.forward, is_changed=is_changed)


class _SavingDispatcher:
    """Keeps what all-to-alls receive: the rows of experts, and the outputs of experts."""

    def __init__(
        self, saver: OutputSaver, dispatcher: Dispatcher, is_sum_read: bool
    ) -> None:
        self._saver = saver
        self._dispatcher = dispatcher
        self._is_sum_read = is_sum_read

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, capacity: Capacity) -> Dispatched:
        """Returns the rows of this rank's experts from all ranks."""
        executed: list[Dispatched] = []

        def rows_of(x_TH: Tensor) -> Tensor:
            executed.append(self._dispatcher.dispatch(x_TH, experts_TK, capacity))
            return executed[0].rows_RH

        rows = self._saver.saving(rows_of)(x_TH)
        # Ranks exchange their numbers of rows in the first run only.
        counts, combine = self._saver.remember(
            lambda: (executed[0].counts, executed[0].combine)
        )
        combine = self._saver.saving(combine, is_read=self._is_sum_read)
        return Dispatched(rows, counts, combine)
