"""Counts what a rank computes in a step: FLOPs and bytes of memory traffic.

These are what the hardware executes, recomputation included; what MFU counts is in
`flops`. Experts are assumed to be balanced and all parameters to be trained. Pure. Must
not know: torch, how fast a device is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.planning.buffers import PlannedMatrices
from megatron_ray.planning.microbatch import (
    grad_width_of,
    hidden_width_of,
    local_vocabulary,
    own_tokens_of,
    tokens_of,
    width_of,
)
from megatron_ray.planning.recompute.saved_outputs import keeps_attention, layer_products
from megatron_ray.sharding.matrices import Matrix, tp_owners


@dataclass(frozen=True)
class Work:
    """Operations of one rank, by what bounds their speed."""

    products: float = 0.0
    """FLOPs of matrix products."""
    attention: float = 0.0
    """FLOPs of attention, which skips masked scores."""
    memory: float = 0.0
    """Bytes read and written by memory-bound operations."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.memory + other.memory,
        )


def stage_work(config: TrainConfig, stage: StageContents) -> Work:
    """Returns the work of a stage for one microbatch, forward and backward.

    Recomputation is included.
    """
    # Models have many layers of few kinds.
    by_kind: dict[object, LayerWork] = {}
    layers = []
    for index in stage.layers:
        kind = (config.model.experts_on(index) is not None, config.model.window_on(index))
        if kind not in by_kind:
            by_kind[kind] = layer_work(config, index)
        layers.append(by_kind[kind])

    work = Work()
    for layer in layers:
        work += layer.forward + layer.backward
    work += _recomputed(config, layers)
    # A look-up reads and writes hidden states, and its backward pass reads gradients.
    lookups = int(stage.embedding) + len(stage.mtp_layers)
    hidden_bytes = own_tokens_of(config) * config.model.hidden_size * width_of(config)
    work += Work(memory=3.0 * lookups * hidden_bytes)
    for index in stage.mtp_layer_numbers(config.model.num_layers):
        layer = layer_work(config, index)
        work += (
            layer.forward
            + layer.backward
            + _recomputed(config, [layer])
            + _mtp_projection(config)
            + _head(config)
        )
    if stage.loss:
        work += _head(config)
    return work


def update_work(updated: int, trained: int, state_bytes: int) -> Work:
    """Returns the work of the optimizer update on one rank.

    The rank has gradients of `trained` elements and updates `updated` of them, with
    `state_bytes` of state. Per trained element zeroing writes 4 bytes. Per updated
    element the gradient norm reads 4, scaling reads and writes 8, the optimizer reads
    weight, gradient and state and writes all but the gradient, and the new bf16 weight
    takes 2.
    """
    return Work(memory=4.0 * trained + 26.0 * updated + 2.0 * state_bytes)


def orthogonalization_work(matrices: PlannedMatrices, steps: int) -> Work:
    """Returns the Newton-Schulz products of the busiest rank of each round."""
    flops = 0
    for round_ in matrices.rounds:
        sharded: dict[int, list[Matrix]] = {}
        replicated: dict[int, int] = {}
        for owned in round_:
            sharded.setdefault(owned.owner, [])
            replicated.setdefault(owned.owner, 0)
            if owned.matrix.is_sharded:
                sharded[owned.owner].append(owned.matrix)
            else:
                replicated[owned.owner] += owned.matrix.flops(steps)
        busiest = 0
        for replica, own in sharded.items():
            by_rank = [replicated[replica]] * matrices.tp
            for matrix, rank in zip(own, tp_owners(own, matrices.tp), strict=True):
                by_rank[rank] += matrix.flops(steps)
            busiest = max(busiest, *by_rank)
        flops += busiest
    return Work(products=float(flops))


def _head(config: TrainConfig) -> Work:
    """Returns the work of the output head and the loss.

    Three products with the vocabulary, and six passes over the logits.
    """
    tokens = tokens_of(config)
    rows = local_vocabulary(config)
    return Work(
        products=6.0 * tokens * rows * config.model.hidden_size,
        memory=6.0 * tokens * rows * width_of(config),
    )


def _mtp_projection(config: TrainConfig) -> Work:
    """Returns the work of joining an embedding to the hidden state in an MTP layer.

    The projection from 2 H to H has three products, and its fp32 gradient is read and
    written. Memory traffic is that of three norms (2 passes forward, 3 backward) and of
    concatenating two inputs (4 passes each way).
    """
    own = own_tokens_of(config)
    hidden = config.model.hidden_size
    return Work(
        products=12.0 * own * hidden * hidden,
        memory=23.0 * own * hidden * width_of(config) + 16.0 * hidden * hidden,
    )


@dataclass(frozen=True)
class LayerWork:
    """Work of one layer for one microbatch."""

    core: Work
    """Attention without projections, forward."""
    mlp: Work
    """MLP or experts with their norm, forward."""
    forward: Work
    """The whole layer, core and MLP included."""
    around_saved_outputs: Work
    """A forward pass without what recompute.granularity=operations does not repeat."""
    backward: Work


def _hidden_bytes(config: TrainConfig) -> float:
    """Returns the bytes of a pass over hidden states, the mean of a layer's.

    Of the five passes of a norm and a residual addition, two are over outputs of layers.
    """
    width = (3 * hidden_width_of(config) + 2 * width_of(config)) / 5
    return own_tokens_of(config) * config.model.hidden_size * width


def layer_work(config: TrainConfig, index: int) -> LayerWork:
    """Returns the work of a layer (counted from 0) on one rank."""
    model = config.model
    residual = _hidden_bytes(config)
    projections = _attention_projections(config)
    mlp_elements, mlp_weights = _mlp_sizes(config, index)
    matrices = 3 if model.gated else 2
    # What the activation function reads and writes: gate and up, or up alone, and its
    # output.
    activation = mlp_elements * matrices * width_of(config)

    core = _core_work(config, index)
    # A norm and a residual addition make five passes over hidden states.
    mlp = Work(
        products=2.0 * matrices * mlp_elements * model.hidden_size,
        memory=float(5 * residual + activation),
    )
    forward = core + mlp
    forward += Work(
        products=2.0 * projections.multiplications,
        memory=5 * residual + projections.moved_bytes,
    )

    # Accumulating a weight gradient reads and writes the sum.
    accumulated = 2.0 * grad_width_of(config) * (projections.num_weights + mlp_weights)
    # The backward pass has two products for each of the forward's. A fused attention
    # kernel has five in its backward where its forward has two.
    backward = Work(
        products=2 * forward.products,
        attention=2.5 * core.attention,
        memory=10 * residual + projections.moved_bytes + 5 / 3 * activation + accumulated,
    )
    return LayerWork(
        core, mlp, forward, _around_saved_outputs(config, index, forward), backward
    )


def _around_saved_outputs(config: TrainConfig, index: int, forward: Work) -> Work:
    """Returns what is left of a layer's forward pass, memory traffic as a whole."""
    products = 0
    for product in layer_products(config, index):
        # As in the forward pass, those of a router are left out.
        if product.runs_again and product.kind != "router":
            products += product.flops
    attention = forward.attention
    if keeps_attention(config):
        attention = 0.0
    return Work(float(products), attention, forward.memory)


def _core_work(config: TrainConfig, index: int) -> Work:
    """Returns the work of attention without projections, forward."""
    model = config.model
    heads = model.num_attention_heads // config.parallel.tp
    seen = _average_keys(config.training.seq_length, model.window_on(index))
    # 2 FLOPs per key and element for Q K^T, and 2 for the product with V.
    return Work(attention=4.0 * tokens_of(config) * heads * model.head_width * seen)


def _mlp_sizes(config: TrainConfig, index: int) -> tuple[int, int]:
    """Returns the elements of all MLP activations and of all MLP weights on a rank.

    Activations are those between the two products of an MLP, over all of its tokens.
    """
    model = config.model
    parallel = config.parallel
    tokens = tokens_of(config)
    matrices = (3 if model.gated else 2) * model.hidden_size
    moe = model.experts_on(index)
    if moe is None:
        activations = tokens * model.ffn_width // parallel.tp
        return activations, matrices * model.ffn_width // parallel.tp
    shared_width = (moe.shared_expert_ffn_hidden_size or 0) // parallel.tp
    local_experts = moe.num_experts // parallel.ep
    local_width = model.expert_width // parallel.expert_tp
    # With balanced experts a rank has as many rows as its own tokens choose experts.
    routed = own_tokens_of(config) * moe.top_k * model.expert_width
    activations = routed + tokens * shared_width
    return activations, matrices * (local_experts * local_width + shared_width)


@dataclass(frozen=True)
class _Projections:
    """The projections of attention on one rank, and the operations around its core."""

    num_weights: int
    multiplications: int
    """Multiplications of a forward pass: tokens x weights that they are multiplied by."""
    moved_bytes: float
    """Bytes read and written by operations between projections and core."""


def _attention_projections(config: TrainConfig) -> _Projections:
    model = config.model
    mla = model.mla
    if mla is not None:
        return _latent_projections(config)
    tp = config.parallel.tp
    tokens = tokens_of(config)
    # Queries and outputs, keys and values; a key/value head is replicated where there
    # are fewer of them than tp ranks.
    heads = model.num_attention_heads // tp + max(model.kv_heads, tp) // tp
    weights = model.hidden_size * 2 * heads * model.head_width
    # Rotation reads and writes queries and keys.
    rotated = 2.0 * tokens * heads * model.head_width * width_of(config)
    return _Projections(weights, tokens * weights, rotated)


def _latent_projections(config: TrainConfig) -> _Projections:
    """Returns the projections of latent attention.

    Those from and to heads are split over tp; those to the latents are whole on every
    rank, and apply to its own tokens only.
    """
    model = config.model
    mla = model.mla
    assert mla is not None
    tokens = tokens_of(config)
    own = own_tokens_of(config)
    heads = model.num_attention_heads // config.parallel.tp
    key_value_width = mla.qk_nope_head_dim + mla.v_head_dim
    split_weights = heads * (
        (mla.q_lora_rank or model.hidden_size) * mla.qk_head_dim
        + mla.kv_lora_rank * key_value_width
        + mla.v_head_dim * model.hidden_size
    )
    latents = (mla.q_lora_rank or 0) + mla.kv_lora_rank
    whole_weights = model.hidden_size * (latents + mla.qk_rope_head_dim)
    # Queries are read, and keys with values; queries, keys and padded values are written
    # at full width; values are cut out of the output. Latents are normed.
    moved = heads * (4 * mla.qk_head_dim + key_value_width + 2 * mla.v_head_dim)
    moved_bytes = float(width_of(config) * (tokens * moved + 2 * own * latents))
    return _Projections(
        split_weights + whole_weights,
        tokens * split_weights + own * whole_weights,
        moved_bytes,
    )


def _average_keys(length: int, window: int | None) -> float:
    """Returns how many keys a token of a sequence attends to on average.

    Token i of a causal sequence attends to min(i, window) keys.
    """
    if window is None or window >= length:
        return length / 2
    return window - window * window / (2 * length)


def _recomputed(config: TrainConfig, layers: Sequence[LayerWork]) -> Work:
    """Returns the work of the second forward passes."""
    recompute = config.training.recompute
    work = Work()
    if recompute.granularity == "operations":
        for layer in layers:
            work += layer.around_saved_outputs
        return work
    if recompute.granularity == "full":
        recomputed = layers
        if recompute.method == "block":
            recomputed = layers[: recompute.num_layers]
        for layer in recomputed:
            work += layer.forward
        return work
    modules = recompute.chosen_modules
    for layer in layers:
        if "core_attention" in modules:
            work += layer.core
        if "mlp" in modules or "moe" in modules:
            work += layer.mlp
        elif "norm" in modules or "activation" in modules:
            # Norms and activation functions have no products.
            work += Work(memory=layer.mlp.memory)
    return work
