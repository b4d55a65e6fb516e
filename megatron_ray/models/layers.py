"""Defines the protocol between a model and the factory of its layers.

A model requests layers by their specs, with full sizes; the factory returns layers that
may hold only a part of the weights. Must not know: any layout, sharding.

Shapes: T tokens, R rows sorted by expert, E experts, K experts of a token, V
vocabulary; B batch, N query heads, G key/value heads, S sequence, D width of a head.
"""

from typing import Protocol

from torch import Tensor, nn

from megatron_ray.expert_parallel.dispatch import Capacity, Dispatched
from megatron_ray.expert_parallel.layers import ExpertBias
from megatron_ray.models.aux_loss import AuxLoss
from megatron_ray.sharding.expert_specs import GroupedColumnSpec, GroupedRowSpec
from megatron_ray.sharding.layer_specs import (
    ColumnSpec,
    NormSpec,
    QKVSpec,
    ReplicatedSpec,
    RowSpec,
    VocabularySpec,
)


class Head(Protocol):
    """An output head: computes the loss in training, logits in inference."""

    def __call__(self, hidden_TH: Tensor, labels_T: Tensor, mask_T: Tensor) -> Tensor:
        """Returns the sum of mask x -log p(label)."""
        ...

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Returns [T, V]."""
        ...


class Dispatcher(Protocol):
    """Dispatches tokens to their experts and back; see expert_parallel.dispatch."""

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, capacity: Capacity) -> Dispatched:
        """Returns the rows of this rank's experts and a function to combine outputs."""
        ...


class QKV(Protocol):
    """A projection to queries, keys and values of this rank's heads.

    [T, inputs] -> [T, (heads + 2 groups) x head_width].
    """

    heads: int
    """Query heads on this rank."""
    groups: int
    """Key/value heads on this rank."""

    def __call__(self, x_TH: Tensor) -> Tensor:
        """Returns the concatenated queries, keys and values."""
        ...


class LayerFactory(Protocol):
    """Makes each layer of a model from its spec.

    Shapes are local to a rank. "This rank's" tokens are all tokens of its sequences, or
    its part of them under sequence parallelism.
    """

    # ---- layers with weights

    def embedding(self, spec: VocabularySpec, uses: int) -> nn.Module:
        """Makes a layer: token ids [T] -> [T, width] of this rank's tokens.

        `uses`: number of calls of the layer per microbatch.
        """
        ...

    def position_embedding(self, spec: ReplicatedSpec) -> nn.Module:
        """Makes a layer: position ids [T] -> [T, width] of this rank's tokens."""
        ...

    def norm(self, spec: NormSpec) -> nn.Module:
        """Makes a layer: [rows, width] -> same; rows are tokens, or heads of tokens."""
        ...

    def column(self, spec: ColumnSpec) -> nn.Module:
        """Makes a layer: [T, inputs], this rank's tokens -> [T, outputs cut over tp], all."""
        ...

    def qkv(self, spec: QKVSpec) -> QKV:
        """Makes a `QKV`, a column-parallel layer for the heads on this rank."""
        ...

    def row(self, spec: RowSpec) -> nn.Module:
        """Makes a layer: ([T, inputs cut over tp], residual or None) -> [T, outputs].

        The residual and the outputs are of this rank's tokens.
        """
        ...

    def replicated(self, spec: ReplicatedSpec) -> nn.Module:
        """Makes a layer: [T, inputs] -> [T, outputs], both of this rank's tokens."""
        ...

    def router(self, spec: ReplicatedSpec) -> nn.Module:
        """Makes a layer: [T, width] -> logits [T, E], at least fp32."""
        ...

    def expert_column(self, spec: GroupedColumnSpec) -> nn.Module:
        """Makes a layer: (rows [R, inputs], counts [E]) -> [R, outputs cut over etp].

        Rows belong to this rank's experts, sorted by expert; `counts` are the rows of
        each expert.
        """
        ...

    def expert_row(self, spec: GroupedRowSpec) -> nn.Module:
        """Makes a layer: (rows [R, inputs cut over etp], counts [E]) -> [R, outputs].

        The outputs are partial sums over etp; the dispatcher reduces them.
        """
        ...

    def head(
        self, spec: VocabularySpec, embedding: nn.Module | None, uses: int
    ) -> nn.Module:
        """Makes a `Head`, which shares the embedding's weight if one is passed.

        `uses`: number of calls of the head per microbatch.
        """
        ...

    # ---- layers without weights

    def gather_from_sequence_parallel(self) -> nn.Module:
        """Makes a layer: [T, width], this rank's tokens -> all tokens of the tp group."""
        ...

    def attention(self, window: int | None) -> nn.Module:
        """Makes a layer: (q [B, N, S, D], k, v [B, G, S, D], Packed or None) -> [B, N, S, D].

        Causal attention, over whole sequences or over their last `window` tokens.
        """
        ...

    def attention_with_dropout(self, name: str, window: int | None) -> nn.Module | None:
        """Makes a layer like `attention` with dropout on its probabilities.

        The first sample is an additional argument. `name` identifies the random number
        stream. Returns None without dropout.
        """
        ...

    def hidden_dropout(self, name: str) -> nn.Module | None:
        """Makes a layer: ([T, width] of this rank's tokens, first sample) -> [T, width].

        `name` identifies the random number stream. Returns None without dropout.
        """
        ...

    def expert_bias(self, num_experts: int, rate: float) -> ExpertBias:
        """Makes a bias that balances the choice of experts without a loss.

        A step moves it by `rate`.
        """
        ...

    def dispatcher(self, num_experts: int) -> Dispatcher:
        """Makes the dispatcher of tokens to experts."""
        ...

    def aux_loss(self, kind: str, divisor: float, *, is_per_rank: bool) -> AuxLoss:
        """Makes an auxiliary loss; see `AuxLoss`.

        `is_per_rank`: each tp rank has its own part; otherwise all have the same loss.
        """
        ...

    # ---- what depends on where tokens are

    def local_rows(self, tensor: Tensor) -> Tensor:
        """Returns the rows of this rank's tokens of a tensor [T, ...]."""
        ...

    def sum_over_tokens(self, tensor: Tensor) -> Tensor:
        """Sums in place over all ranks that share a microbatch."""
        ...
