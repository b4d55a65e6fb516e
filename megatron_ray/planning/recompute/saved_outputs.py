"""Computes what layers keep, and do not compute again, with recompute=operations.

Owns: the products of a layer in the order in which `RecomputeConfig.saves_product`
counts them, and the bytes of outputs that are kept. Pure. Must not know: torch, nodes.

Letters as in `planning.activations`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_ray.config.architecture.latent import LatentAttentionConfig
from megatron_ray.config.architecture.moe import MoEConfig
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.ops.attention.choice import attention_kernel
from megatron_ray.planning.microbatch import (
    hidden_width_of,
    own_tokens_of,
    tokens_of,
    width_of,
)

_FP32 = 4
_INT64 = 8

ProductKind = Literal["column", "row", "replicated", "router", "experts"]


@dataclass(frozen=True)
class Product:
    """A matrix product of a layer on one rank, for one microbatch."""

    kind: ProductKind
    inputs: int
    """Width of a row of its input."""
    output_bytes: int
    flops: int
    """Those of its forward pass."""
    num_matrices: int = 1
    """Matrices of experts on the rank."""
    makes_heads: bool = False
    """Whether its output becomes queries, keys or values."""
    ends_layer: bool = False
    """Whether nothing reads its output in the backward pass, which thus is neither kept
    nor computed again."""
    is_kept: bool = False
    """Whether its output is kept."""

    @property
    def runs_again(self) -> bool:
        """Whether recomputation executes it."""
        return not (self.is_kept or self.ends_layer)


def layer_products(config: TrainConfig, index: int) -> tuple[Product, ...]:
    """Returns the products of a layer (counted from 0), in the order of its forward."""
    recompute = config.training.recompute
    sums_over_tp = config.parallel.tp > 1 and "reduce_scatter" in recompute.saved_operations
    products = []
    for position, product in enumerate(_products(config, index)):
        is_summed = product.kind == "row" and sums_over_tp
        is_chosen = recompute.saves_product(position) or is_summed
        is_kept = is_chosen and not product.ends_layer
        products.append(replace(product, is_kept=is_kept))
    return tuple(products)


def keeps_attention(config: TrainConfig) -> bool:
    """Returns whether the output of attention is kept."""
    saved = config.training.recompute.saved_operations
    return "attention" in saved and not config.model.attention_dropout


def keeps_exchanges(config: TrainConfig) -> bool:
    """Returns whether the rows that experts exchange are kept."""
    parallel = config.parallel
    is_exchanged = parallel.ep > 1 and parallel.dispatcher == "alltoall"
    return is_exchanged and "all_to_all" in config.training.recompute.saved_operations


@dataclass(frozen=True)
class SavedOutputs:
    """Bytes of outputs that one layer keeps of one microbatch."""

    products: int
    before_attention: int
    """Of `products`, those whose memory is free after the heads have been made from them
    where nothing is recomputed."""
    attention: int
    """w T N D / tp of outputs and 4 T N / tp of log-sum-exps, which the blocks of bf16 on
    CPU do not have. Where ranks share sequences, another 2 w T G D / tp of keys and
    values, stacked; and w T (N + 2 G) D / tp of copies that the blocks of bf16 on CPU
    make of heads without rotation, unless batch or groups are 1."""
    exchanges: int
    """w T K H (etp + 1) / s of rows there and back, and their orders, 8 T K (1 + 2 etp) /
    s; w T H / s of their sums if these are normed."""

    @property
    def whole(self) -> int:
        """Bytes of all of them."""
        return self.products + self.attention + self.exchanges


def saved_outputs(config: TrainConfig, index: int, device: DeviceKind) -> SavedOutputs:
    """Returns what a layer (counted from 0) keeps besides its input on one rank."""
    products = 0
    before_attention = 0
    for product in layer_products(config, index):
        if product.is_kept:
            products += product.output_bytes
            if product.makes_heads:
                before_attention += product.output_bytes
    attention = 0
    if keeps_attention(config):
        attention = _attention_bytes(config, index, device)
    exchanges = 0
    moe = config.model.experts_on(index)
    if moe is not None and keeps_exchanges(config):
        exchanges = _exchange_bytes(config, moe)
    return SavedOutputs(products, before_attention, attention, exchanges)


def _attention_bytes(config: TrainConfig, index: int, device: DeviceKind) -> int:
    model = config.model
    parallel = config.parallel
    width = width_of(config)
    heads = model.num_attention_heads // parallel.tp
    groups = _local_groups(config)
    is_tiled = parallel.cp > 1 and parallel.cp_method != "a2a"
    kernel = attention_kernel(
        device,
        precision=config.training.precision,
        sequence=config.training.seq_length,
        window=model.window_on(index),
    )
    per_token = width * heads * model.head_width
    if is_tiled:
        per_token += width * 2 * groups * model.head_width
    if is_tiled or kernel != "blocks":
        per_token += _FP32 * heads
    elif _copies_heads(config, groups):
        per_token += width * (heads + 2 * groups) * model.head_width
    return tokens_of(config) * per_token


def _copies_heads(config: TrainConfig, groups: int) -> bool:
    """Returns whether batched products copy queries, keys and values.

    The rotation and latent attention already write heads first, and so do exchanges.
    """
    model = config.model
    are_tokens_first = model.mla is None and model.position_embedding != "rope"
    is_view = config.training.micro_batch_size == 1 or groups == 1
    return are_tokens_first and config.parallel.cp == 1 and not is_view


def _exchange_bytes(config: TrainConfig, moe: MoEConfig) -> int:
    own = own_tokens_of(config)
    etp = config.parallel.expert_tp
    row_bytes = width_of(config) * config.model.hidden_size
    # Slots of rows here, and the two orders of rows that arrive.
    order_bytes = _INT64 * (1 + 2 * etp)
    kept = own * moe.top_k * (row_bytes * (etp + 1) + order_bytes)
    if config.model.peri_norm:
        kept += own * row_bytes
    return kept


# ---- the products


def _products(config: TrainConfig, index: int) -> Iterator[Product]:
    model = config.model
    heads = model.num_attention_heads // config.parallel.tp
    if model.mla is None:
        columns = (heads + 2 * _local_groups(config)) * model.head_width
        yield replace(_column(config, model.hidden_size, columns), makes_heads=True)
    else:
        yield from _latent_products(config, model.mla)
    yield _row(config, heads * model.value_width)
    moe = model.experts_on(index)
    if moe is not None:
        yield from _products_of_experts(config, moe)
        return
    ffn_width = model.ffn_width // config.parallel.tp
    yield _column(config, model.hidden_size, _expanded(model) * ffn_width)
    # A norm of its output reads it.
    yield replace(_row(config, ffn_width), ends_layer=not model.peri_norm)


def _local_groups(config: TrainConfig) -> int:
    """Returns the key/value heads on a rank."""
    tp = config.parallel.tp
    return max(config.model.kv_heads, tp) // tp


def _expanded(model: ModelConfig) -> int:
    return 2 if model.gated else 1


def _column(config: TrainConfig, inputs: int, outputs: int) -> Product:
    elements = tokens_of(config) * outputs
    return Product("column", inputs, width_of(config) * elements, 2 * inputs * elements)


def _replicated(config: TrainConfig, inputs: int, outputs: int) -> Product:
    elements = own_tokens_of(config) * outputs
    return Product("replicated", inputs, width_of(config) * elements, 2 * inputs * elements)


def _row(config: TrainConfig, inputs: int) -> Product:
    """Returns a product whose output has the type of the residual that is added to it."""
    model = config.model
    width = hidden_width_of(config)
    if model.hidden_dropout or model.peri_norm or model.residual_factor != 1.0:
        width = width_of(config)
    output_bytes = width * own_tokens_of(config) * model.hidden_size
    flops = 2 * tokens_of(config) * inputs * model.hidden_size
    return Product("row", inputs, output_bytes, flops)


def _latent_products(config: TrainConfig, mla: LatentAttentionConfig) -> Iterator[Product]:
    hidden = config.model.hidden_size
    rank = mla.kv_lora_rank
    heads = config.model.num_attention_heads // config.parallel.tp
    queries = heads * mla.qk_head_dim
    if mla.q_lora_rank is None:
        yield replace(_column(config, hidden, queries), makes_heads=True)
    else:
        yield _replicated(config, hidden, mla.q_lora_rank)
        yield replace(_column(config, mla.q_lora_rank, queries), makes_heads=True)
    yield _replicated(config, hidden, rank + mla.qk_rope_head_dim)
    keys_values = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield replace(_column(config, rank, keys_values), makes_heads=True)


def _products_of_experts(config: TrainConfig, moe: MoEConfig) -> Iterator[Product]:
    model = config.model
    hidden = model.hidden_size
    parallel = config.parallel
    logits = own_tokens_of(config) * moe.num_experts
    yield Product("router", hidden, _FP32 * logits, 2 * hidden * logits)
    if moe.shared_expert_ffn_hidden_size is not None:
        shared = moe.shared_expert_ffn_hidden_size // parallel.tp
        yield _column(config, hidden, _expanded(model) * shared)
        yield _row(config, shared)
    # Rows arrive gathered over etp and balanced over ep.
    rows = own_tokens_of(config) * moe.top_k * parallel.expert_tp
    inner = model.expert_width // parallel.expert_tp
    for inputs, outputs in ((hidden, _expanded(model) * inner), (inner, hidden)):
        yield Product(
            "experts",
            inputs,
            width_of(config) * rows * outputs,
            2 * rows * inputs * outputs,
            num_matrices=moe.num_experts // parallel.ep,
        )
