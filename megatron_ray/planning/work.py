"""What a rank has to do in a step, in FLOP and bytes.

Owns: counting products, attention and trips to memory of each stage.

These are what the hardware does, recomputation included; what MFU counts is in `flops`.
Experts are taken to be balanced and everything to be trained. Pure. Must not know:
torch, how fast a device is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.planning.microbatch import (
    local_vocabulary,
    own_tokens_of,
    tokens_of,
    width_of,
)


@dataclass(frozen=True)
class Work:
    """Of one rank."""

    products: float = 0.0
    """FLOP of matrix products."""
    attention: float = 0.0
    """FLOP of attention that skips what is masked."""
    memory: float = 0.0
    """Bytes read and written by everything that is bound by memory."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.memory + other.memory,
        )

    def __mul__(self, times: float) -> "Work":
        return Work(self.products * times, self.attention * times, self.memory * times)


def stage_work(config: TrainConfig, stage: StageContents) -> Work:
    """Of one microbatch, forward and backward, with what is recomputed."""
    kinds = {_kind(config, index): index for index in stage.layers}
    known = {kind: _Layer(config, index) for kind, index in kinds.items()}
    layers = [known[_kind(config, index)] for index in stage.layers]
    found = sum((layer.forward + layer.backward for layer in layers), Work()) + _recomputed(
        config, layers
    )
    embeddings = int(stage.embedding) + len(stage.mtp_layers)
    found += Work(
        memory=3.0
        * embeddings
        * own_tokens_of(config)
        * config.model.hidden_size
        * width_of(config)
    )
    for index in stage.mtp_layer_numbers(config.model.num_layers):
        layer = _Layer(config, index)
        found += (
            layer.forward
            + layer.backward
            + _recomputed(config, [layer])
            + _joining(config)
            + _head(config)
        )
    return found + _head(config) if stage.loss else found


def _kind(config: TrainConfig, index: int) -> object:
    """Equal for layers with the same work."""
    return config.model.experts_on(index) is not None, config.model.window_on(index)


def update_work(updated: int, trained: int) -> Work:
    """Of one step on a rank that updates `updated` of the `trained` elements it has
    gradients of: zeroing them, the norm (4 bytes), scaling (8), AdamW (16 read, 12
    written), new weights (2).
    """
    return Work(memory=4.0 * trained + 42.0 * updated)


def _head(config: TrainConfig) -> Work:
    """Three products with the vocabulary, and six passes over the logits."""
    tokens = tokens_of(config)
    rows = local_vocabulary(config)
    width = width_of(config)
    return Work(
        6.0 * tokens * rows * config.model.hidden_size, 0.0, 6.0 * tokens * rows * width
    )


def _joining(config: TrainConfig) -> Work:
    """Of a further token's embedding and what came before: three products of the
    projection, whose fp32 gradient is read and written, and trips of the three norms (2
    forward, 3 backward) and of putting two inputs into one (4 each way).
    """
    own = own_tokens_of(config)
    hidden = config.model.hidden_size
    return Work(
        12.0 * own * hidden * hidden,
        0.0,
        23.0 * own * hidden * width_of(config) + 16.0 * hidden * hidden,
    )


class _Layer:
    """Work of one layer; `mlp` is the part of its forward after the attention."""

    def __init__(self, config: TrainConfig, index: int) -> None:
        model = config.model
        tp = config.parallel.tp
        tokens = tokens_of(config)
        own = own_tokens_of(config)
        width = width_of(config)
        heads = model.num_attention_heads // tp
        seen = _keys_seen(config.training.seq_length, model.window_on(index))
        inner, weights = self._inner(config, index)
        matrices = 3 if model.gated else 2
        residual = own * model.hidden_size * width
        cut, whole, around = _around_attention(config)
        activation = (
            inner * matrices * width
            # what the non-linearity reads and writes: gate and up, or up alone, and its
            # output
        )
        self.core = Work(attention=4.0 * tokens * heads * model.head_width * seen)
        self.mlp = Work(
            2.0 * matrices * inner * model.hidden_size,
            0.0,
            float(5 * residual + activation),
        )
        self.forward = (
            Work(2.0 * (tokens * cut + own * whole), 0.0, 5 * residual + around)
            + self.core
            + self.mlp
        )
        # Two products for each of the forward's; a fused kernel's backward makes five
        # where its forward makes two.
        products = 2 * self.forward.products
        attention = 2.5 * self.core.attention
        # fp32 gradients are read and written
        accumulated = 8.0 * (cut + whole + weights)
        self.backward = Work(
            products, attention, 10 * residual + around + 5 / 3 * activation + accumulated
        )

    @staticmethod
    def _inner(config: TrainConfig, index: int) -> tuple[int, int]:
        """(numbers between the two products of all MLPs here, elements of their
        weights).
        """
        model = config.model
        parallel = config.parallel
        tokens = tokens_of(config)
        matrices = (3 if model.gated else 2) * model.hidden_size
        moe = model.experts_on(index)
        if moe is None:
            return (
                tokens * model.ffn_width // parallel.tp,
                matrices * model.ffn_width // parallel.tp,
            )
        shared = (moe.shared_expert_ffn_hidden_size or 0) // parallel.tp
        held = moe.num_experts // parallel.ep * (model.expert_width // parallel.expert_tp)
        return own_tokens_of(
            config
        ) * moe.top_k * model.expert_width + tokens * shared, matrices * (held + shared)


def _around_attention(config: TrainConfig) -> tuple[int, int, float]:
    """(weights that all tokens of the rank go through, those that only the tokens do
    that are cut here under sequence parallelism, bytes that rotating takes and, of
    latent attention, norming the latents, putting heads together and cutting their
    values back).
    """
    model = config.model
    tp = config.parallel.tp
    tokens = tokens_of(config)
    own = own_tokens_of(config)
    width = width_of(config)
    heads = model.num_attention_heads // tp
    groups = max(model.kv_heads, tp) // tp
    mla = model.mla
    if mla is None:
        return (
            model.hidden_size * 2 * (heads + groups) * model.head_width,
            0,
            2.0 * tokens * (heads + groups) * model.head_width * width,
        )
    queries = mla.q_lora_rank or model.hidden_size
    outputs = mla.qk_nope_head_dim + mla.v_head_dim
    cut = heads * (
        queries * mla.qk_head_dim
        + mla.kv_lora_rank * outputs
        + mla.v_head_dim * model.hidden_size
    )
    latents = (mla.q_lora_rank or 0) + mla.kv_lora_rank
    # Read are queries, and keys with values; written three of full width; values are
    # cut out of what is attended to.
    moved = heads * (4 * mla.qk_head_dim + outputs + 2 * mla.v_head_dim)
    return (
        cut,
        model.hidden_size * (latents + mla.qk_rope_head_dim),
        float(width * (tokens * moved + 2 * own * latents)),
    )


def _keys_seen(length: int, window: int | None) -> float:
    """On average, by a token of a sequence."""
    if window is None or window >= length:
        return length / 2
    return window - window * window / (2 * length)


def _recomputed(config: TrainConfig, layers: Sequence[_Layer]) -> Work:
    recompute = config.training.recompute
    if recompute.granularity == "full":
        again = layers if recompute.method == "uniform" else layers[: recompute.num_layers]
        return sum((layer.forward for layer in again), Work())
    found = Work()
    for layer in layers:
        if "core_attention" in recompute.chosen_modules:
            found += layer.core
        if {"mlp", "moe"} & set(recompute.chosen_modules):
            found += layer.mlp
        elif {"norm", "activation"} & set(recompute.chosen_modules):
            found += Work(memory=layer.mlp.memory)
    return found
