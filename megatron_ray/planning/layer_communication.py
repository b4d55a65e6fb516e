"""Counts what the layers of a stage send for one microbatch.

Each method of `LayerCommunication` repeats the collectives of the layer that it is named
after, in the order in which that layer starts them. tests/parallel/test_communication.py
compares the bytes with those of real steps, exactly.

Pure. Must not know: torch, bandwidths, how a collective is carried out.

Letters as in `activations`: T tokens of a microbatch on a context-parallel rank, t = T
/ tp under sequence parallelism, else T.
"""

from collections.abc import Iterable, Sequence
from math import ceil

from megatron_ray.config.architecture.latent import LatentAttentionConfig
from megatron_ray.config.architecture.moe import MoEConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.planning.layers.tensor_parallel import TensorParallelCommunication
from megatron_ray.planning.recompute.saved_outputs import (
    Product,
    keeps_attention,
    keeps_exchanges,
    layer_products,
)
from megatron_ray.planning.tally import Tally, group_sizes

_FP32 = 4
_INT64 = 8


def stage_communication(
    config: TrainConfig, dims: ParallelDims, stage: StageContents
) -> Tally:
    """Returns what one stage sends for one microbatch, forward and backward.

    Messages between stages are left out.
    """
    communication = LayerCommunication(config, Tally(group_sizes(dims)))
    if stage.embedding:
        communication.embedding()
    mtp_layers = stage.mtp_layer_numbers(config.model.num_layers)
    _add_layers(communication, (*stage.layers, *mtp_layers))
    communication.recomputed_layers(stage.layers)
    if stage.loss:
        communication.head()
    # Each MTP layer looks up tokens one place later than the layer before it, and has a
    # loss of its own.
    for layer in mtp_layers:
        communication.embedding()
        communication.mtp_projection(layer)
        communication.recomputed_layers([layer])
        communication.head()
    return communication.tally


def _add_layers(communication: "LayerCommunication", layers: Sequence[int]) -> None:
    """Adds layers, forward and backward; layers of one kind are counted once."""
    model = communication.model
    by_kind: dict[object, list[int]] = {}
    for layer in layers:
        kind = (model.experts_on(layer) is not None, communication.has_scales(layer))
        by_kind.setdefault(kind, []).append(layer)
    for members in by_kind.values():
        tally = Tally(communication.tally.sizes)
        single = LayerCommunication(communication.config, tally)
        single.enter(members[0])
        single.attention_forward()
        single.attention_backward()
        single.mlp_or_experts_forward(members[0])
        single.mlp_or_experts_backward(members[0])
        communication.tally.add_all(tally, len(members))


class LayerCommunication(TensorParallelCommunication):
    """Adds the collectives of layers to a tally, for one microbatch of one rank."""

    # ---- attention

    def attention_forward(self) -> None:
        """Adds attention with its projections, forward."""
        mla = self.model.mla
        for features in self._projection_inputs:
            self._column_parallel_forward(features)
        if mla is not None:
            self._projections_to_latents(mla)
            # The rotated part of the key is computed from a rank's own tokens and
            # shared by all heads.
            self._gather_tokens(mla.qk_rope_head_dim)
        self.core_attention_forward()
        self._row_parallel_forward()

    def attention_backward(self) -> None:
        """Adds attention with its projections, backward."""
        mla = self.model.mla
        self._row_parallel_backward()
        self._core_attention_backward()
        if mla is not None:
            self._projections_to_latents(mla)
            # No product reads the shared part of the key, so nothing is gathered again.
            self._sum_over_tp(mla.qk_rope_head_dim)
        for features in self._projection_inputs:
            self._column_parallel_backward(features)

    def _projections_to_latents(self, mla: LatentAttentionConfig) -> None:
        """Adds the projections to latents, forward or backward."""
        self._replicated()
        if mla.q_lora_rank is not None:
            self._replicated()

    @property
    def _projection_inputs(self) -> tuple[int, ...]:
        """Widths of the inputs of the projections that are split by heads.

        Those are hidden states, or with latent attention the latents, which each rank
        computes of its own tokens.
        """
        mla = self.model.mla
        if mla is None:
            return (self.hidden,)
        return (mla.q_lora_rank or self.hidden, mla.kv_lora_rank)

    # ---- context parallelism

    def core_attention_forward(self) -> None:
        """Adds RingAttention, AllGatherAttention or UlyssesAttention, forward."""
        method = self.parallel.cp_method
        if method == "all_gather":
            self.tally.add("cp", "all_gather", self._keys_values * self.width)
        if method.startswith("a2a"):
            self._exchange_heads()
        self.tally.add("cp", "send", self._keys_values * self.width, self._ring_hops)

    def _core_attention_backward(self) -> None:
        method = self.parallel.cp_method
        if method == "all_gather":
            # Gathered keys and values are not kept. Their gradients are summed in fp32.
            self.tally.add("cp", "all_gather", self._keys_values * self.width)
            gathered = self._keys_values * self.parallel.cp
            self.tally.add("cp", "reduce_scatter", gathered * _FP32)
        if method.startswith("a2a"):
            self._exchange_heads()
        hops = self._ring_hops
        self.tally.add("cp", "send", self._keys_values * self.width, hops)
        if hops:
            # The fp32 gradients make one hop more, back to the rank that they belong to.
            self.tally.add("cp", "send", self._keys_values * _FP32, hops + 1)

    @property
    def _ring_hops(self) -> int:
        """Messages with keys and values that a rank sends in a pass around the ring."""
        sizes = self.parallel.hierarchical_cp_sizes
        if self.parallel.cp_method == "p2p":
            return self.parallel.cp - 1
        if self.parallel.cp_method == "a2a+p2p" and sizes is not None:
            return sizes[1] - 1
        return 0

    def _exchange_heads(self) -> None:
        """Adds the all-to-alls of UlyssesAttention; those of gradients are as large."""
        sizes = self.parallel.hierarchical_cp_sizes
        if self.parallel.cp_method == "a2a+p2p" and (sizes is None or sizes[0] == 1):
            return
        heads = self.model.num_attention_heads
        queries = self.tokens * heads * self.model.head_width // self.parallel.tp
        keys = self._keys_values // 2
        self.tally.add("cp", "all_to_all", queries * self.width, 2)  # queries and outputs
        self.tally.add("cp", "all_to_all", keys * self.width, 2)  # keys and values

    @property
    def _keys_values(self) -> int:
        """Elements of the keys and values of this rank's heads and tokens."""
        heads = max(self.model.kv_heads, self.parallel.tp) // self.parallel.tp
        return 2 * self.tokens * heads * self.model.head_width

    # ---- MLPs and experts

    def mlp_or_experts_forward(self, layer: int) -> None:
        """Adds a layer's MLP or mixture of experts, forward."""
        moe = self.model.experts_on(layer)
        if moe is None:
            self._mlp_forward()
            return
        self._experts_forward(moe)
        # The balancing loss needs the tokens per expert over all ranks of a microbatch.
        # It is not counted with `_experts_forward`, because recomputation does not
        # compute the loss again.
        if moe.aux_loss_coeff:
            sequences = 1
            if moe.aux_loss == "seq_aux_loss":
                sequences = self.config.training.micro_batch_size
            counts = sequences * moe.num_experts
            self.tally.add("tokens", "all_reduce", _FP32 * counts)

    def mlp_or_experts_backward(self, layer: int) -> None:
        """Adds a layer's MLP or mixture of experts, backward."""
        moe = self.model.experts_on(layer)
        if moe is None:
            self._mlp_backward()
            return
        if moe.shared_expert_ffn_hidden_size is not None:
            self._mlp_backward()
        # Gradients go back along the way of the rows, so the bytes are the same.
        self._dispatch_and_combine(moe)
        self._reduce_scales("etp", 1, self._expert_products(moe))
        if self.parallel.dispatcher == "allgather":
            self._routing_weights_backward(moe)

    def _mlp_forward(self) -> None:
        self._column_parallel_forward(self.hidden)
        self._row_parallel_forward()

    def _mlp_backward(self) -> None:
        self._row_parallel_backward()
        self._column_parallel_backward(self.hidden)

    def _experts_forward(self, moe: MoEConfig) -> None:
        if moe.shared_expert_ffn_hidden_size is not None:
            self._mlp_forward()
        self._route(moe)
        self._dispatch_and_combine(moe)
        self._reduce_scales("etp", 1 + self._weight, self._expert_products(moe))

    def _route(self, moe: MoEConfig) -> None:
        """Adds what ranks tell each other about the choice of experts."""
        if self.parallel.dispatcher == "allgather":
            chosen = moe.top_k * self.own_tokens
            gathered = chosen * self.parallel.expert_tp
            # First the indices of the chosen experts, then their weights.
            for size in (_INT64, _FP32):
                self.tally.add("etp", "all_gather", size * chosen)
                self.tally.add("ep", "all_gather", size * gathered)
        elif not moe.pad_to_capacity:
            # Ranks tell each other how many rows they send to each expert; with padding
            # that number is known.
            self.tally.add("ep", "all_to_all", _INT64 * moe.num_experts)
            self.tally.add("etp", "all_gather", _INT64 * moe.num_experts)

    def _expert_products(self, moe: MoEConfig) -> int:
        """Products of this rank's experts in a forward pass, one after another."""
        return 2 * moe.num_experts // self.parallel.ep

    def _dispatch_and_combine(self, moe: MoEConfig) -> None:
        """Adds AllToAllDispatcher or AllGatherDispatcher: rows there, outputs back."""
        ep = self.parallel.ep
        etp = self.parallel.expert_tp
        row_bytes = self.hidden * self.width
        if self.parallel.dispatcher == "allgather":
            own = self.own_tokens * row_bytes
            self.tally.add("etp", "all_gather", own)
            self.tally.add("etp", "reduce_scatter", own * etp)
            self.tally.add("ep", "all_gather", own * etp)
            self.tally.add("ep", "reduce_scatter", own * etp * ep)
            return
        rows = self._dispatched_rows(moe) * row_bytes
        self.tally.add("ep", "all_to_all", rows, 2)  # there and back
        self.tally.add("etp", "all_gather", rows)
        self.tally.add("etp", "reduce_scatter", rows * etp)

    def _routing_weights_backward(self, moe: MoEConfig) -> None:
        """Adds the gradients of gathered routing weights, fp32."""
        gathered = moe.top_k * self.own_tokens * self.parallel.expert_tp
        self.tally.add("ep", "reduce_scatter", _FP32 * gathered * self.parallel.ep)
        self.tally.add("etp", "reduce_scatter", _FP32 * gathered)

    def _dispatched_rows(self, moe: MoEConfig) -> int:
        """Rows that this rank sends: one per token and chosen expert, up to capacity."""
        chosen = self.own_tokens * moe.top_k
        if moe.capacity_factor is None:
            return chosen
        per_expert = ceil(chosen / moe.num_experts * moe.capacity_factor)
        # An expert gets a token once at most.
        capacity = moe.num_experts * min(self.own_tokens, per_expert)
        if moe.pad_to_capacity:
            return capacity
        return min(chosen, capacity)

    # ---- recomputation

    def recomputed_layers(self, layers: Sequence[int]) -> None:
        """Adds the second forward passes of recomputation.

        The output of the last product of a recomputed region is not summed over tp
        again, because the backward pass does not read it.
        """
        recompute = self.config.training.recompute
        if recompute.granularity == "full":
            is_uniform = recompute.method == "uniform"
            for region in _regions(layers, is_uniform, recompute.num_layers or 1):
                for layer in region:
                    self.enter(layer)
                    self.attention_forward()
                    self._recomputed_mlp(layer, is_last=layer == region[-1])
            return
        if recompute.granularity == "operations":
            for layer in layers:
                self.enter(layer)
                self._recomputed_around_saved_outputs(layer)
            return
        for layer in layers:
            self.enter(layer)
            if "core_attention" in recompute.chosen_modules:
                self.core_attention_forward()
            module = "mlp"
            if self.model.experts_on(layer) is not None:
                module = "moe"
            if module in recompute.chosen_modules:
                self._recomputed_mlp(layer, is_last=True)

    def _recomputed_around_saved_outputs(self, layer: int) -> None:
        """Adds a layer's second forward pass without what `recompute.save` keeps."""
        for product in layer_products(self.config, layer):
            if product.runs_again:
                self._product_forward(product)
            elif product.ends_layer:
                self._reduce_scales("tp", 1, 1 + self._weight)  # as in `_recomputed_mlp`
        if self.model.mla is not None:
            self._gather_tokens(self.model.mla.qk_rope_head_dim)
        if not keeps_attention(self.config):
            self.core_attention_forward()
        elif self.parallel.cp_method.startswith("a2a"):
            self._exchange_heads()
        moe = self.model.experts_on(layer)
        if moe is not None and not keeps_exchanges(self.config):
            self._route(moe)
            self._dispatch_and_combine(moe)

    def _product_forward(self, product: Product) -> None:
        if product.kind == "row":
            self._row_parallel_forward()
        elif product.kind == "column":
            self._column_parallel_forward(product.inputs)
        elif product.kind == "replicated":
            self._replicated()
        elif product.kind == "experts":
            self._reduce_scales("etp", 1 + self._weight, product.num_matrices)

    def _recomputed_mlp(self, layer: int, *, is_last: bool) -> None:
        moe = self.model.experts_on(layer)
        if moe is not None:
            self._experts_forward(moe)
        elif is_last:
            self._column_parallel_forward(self.hidden)
            # Without its product the backward pass reduces the scales, one by one.
            self._reduce_scales("tp", 1, 1 + self._weight)
        else:
            self._mlp_forward()


def _regions(layers: Sequence[int], is_uniform: bool, size: int) -> Iterable[Sequence[int]]:
    """Returns the layers that are recomputed together: see RecomputeConfig.method."""
    if is_uniform:
        return [layers[start : start + size] for start in range(0, len(layers), size)]
    return [[layer] for layer in layers[:size]]
