"""Makes the parallel layers of a model: plain torch modules, for any device.

A layer's local shapes are derived from its spec (`sharding.layer_specs`), like the rows
of the parameter table. Must not know: the order of assembly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.distributed.interleaver import Interleaver
from megatron_ray.distributed.rng import Streams
from megatron_ray.expert_parallel.dispatch import AllGatherDispatcher, AllToAllDispatcher
from megatron_ray.expert_parallel.layers import ExpertBias, GroupedLinear, RouterLinear
from megatron_ray.models.aux_loss import AuxLoss
from megatron_ray.models.dropout import AttentionWithDropout, Dropout
from megatron_ray.models.layers import Dispatcher
from megatron_ray.sharding.expert_specs import GroupedColumnSpec, GroupedRowSpec
from megatron_ray.sharding.layer_specs import (
    ColumnSpec,
    NormSpec,
    QKVSpec,
    ReplicatedSpec,
    RowSpec,
    ShardPosition,
    VocabularySpec,
)
from megatron_ray.tensor_parallel.cross_entropy import VocabParallelHead
from megatron_ray.tensor_parallel.embedding import PositionEmbedding, VocabParallelEmbedding
from megatron_ray.tensor_parallel.group import TensorParallel
from megatron_ray.tensor_parallel.layers import (
    ColumnParallelLinear,
    GatherFromSequenceParallel,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from megatron_ray.tensor_parallel.norm import LayerNorm, RMSNorm


@dataclass(frozen=True)
class ExpertParallelGroups:
    """The groups that share a mixture's experts, and the kind of dispatcher."""

    interleaver: Interleaver
    """Runs another pass while tokens are on their way."""
    ep_group: Group = None
    etp_group: Group = None
    token_group: Group = None
    """Ranks with tokens of the same microbatch."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"


class ParallelLayerFactory:
    """Makes a rank's layers; implements `models.layers.LayerFactory`."""

    def __init__(
        self,
        config: ModelConfig,
        position: ShardPosition,
        tp: TensorParallel,
        experts: ExpertParallelGroups,
        *,
        dtype: torch.dtype,
        streams: Streams,
        attention: Callable[[int | None], nn.Module],
    ) -> None:
        self._config = config
        self._position = position
        self._tp = tp
        self._experts = experts
        self._dtype = dtype
        self._streams = streams
        self._attention = attention

    # ---- layers with weights

    def embedding(self, spec: VocabularySpec, uses: int) -> nn.Module:
        """Makes the word embedding, sharded over the vocabulary."""
        shape = spec.shapes(self._position)["weight"]
        return VocabParallelEmbedding(shape, tp=self._tp, dtype=self._dtype, uses=uses)

    def position_embedding(self, spec: ReplicatedSpec) -> nn.Module:
        """Makes a table of positions, replicated on every rank."""
        shape = spec.shapes(self._position)["weight"]
        return PositionEmbedding(shape, tp=self._tp, dtype=self._dtype)

    def norm(self, spec: NormSpec) -> nn.Module:
        """Makes a norm, replicated on every rank."""
        shape = spec.shapes(self._position)["weight"]
        # Only LayerNorm has a bias.
        if spec.bias:
            return LayerNorm(shape, spec.eps, dtype=self._dtype)
        return RMSNorm(shape, spec.eps, dtype=self._dtype, zero_centered=spec.zero_centered)

    def column(self, spec: ColumnSpec) -> nn.Module:
        """Makes a linear layer with outputs sharded over tp."""
        shape = spec.shapes(self._position)["weight"]
        return ColumnParallelLinear(shape, bias=spec.bias, tp=self._tp, dtype=self._dtype)

    def qkv(self, spec: QKVSpec) -> QKVParallelLinear:
        """Makes the projection to this rank's queries, keys and values."""
        return QKVParallelLinear(
            spec.shapes(self._position)["weight"],
            heads=spec.local_heads(self._tp.size),
            groups=spec.local_groups(self._tp.size),
            bias=spec.bias,
            tp=self._tp,
            dtype=self._dtype,
        )

    def row(self, spec: RowSpec) -> nn.Module:
        """Makes a linear layer with inputs sharded over tp."""
        shape = spec.shapes(self._position)["weight"]
        return RowParallelLinear(shape, bias=spec.bias, tp=self._tp, dtype=self._dtype)

    def replicated(self, spec: ReplicatedSpec) -> nn.Module:
        """Makes a linear layer that is replicated on every rank."""
        shape = spec.shapes(self._position)["weight"]
        return ReplicatedLinear(shape, bias=spec.bias, dtype=self._dtype)

    def router(self, spec: ReplicatedSpec) -> nn.Module:
        """Makes the product of a router, replicated on every rank."""
        return RouterLinear(spec.shapes(self._position)["weight"], dtype=self._dtype)

    def expert_column(self, spec: GroupedColumnSpec) -> nn.Module:
        """Makes the first product of this rank's experts."""
        shape = spec.shapes(self._position)["weight"]
        num_experts = spec.local_experts(self._position)
        return GroupedLinear(shape, num_experts, dtype=self._dtype)

    def expert_row(self, spec: GroupedRowSpec) -> nn.Module:
        """Makes the last product of this rank's experts."""
        shape = spec.shapes(self._position)["weight"]
        num_experts = spec.local_experts(self._position)
        return GroupedLinear(shape, num_experts, dtype=self._dtype)

    def head(
        self, spec: VocabularySpec, embedding: nn.Module | None, uses: int
    ) -> nn.Module:
        """Makes the output head, tied to the embedding if one is passed."""
        # A tied head uses the embedding's parameter, so the table has no row for the head.
        tied = None
        if embedding is not None:
            assert isinstance(embedding, VocabParallelEmbedding)
            tied = embedding.weight
        return VocabParallelHead(
            spec.shapes(self._position)["weight"],
            valid_rows=spec.valid_rows(self._position),
            vocabulary=spec.vocabulary,
            tp=self._tp,
            dtype=self._dtype,
            tied=tied,
            uses=uses,
        )

    # ---- layers without weights

    def gather_from_sequence_parallel(self) -> nn.Module:
        """Makes the gather of rows that the heads of all tp ranks read."""
        return GatherFromSequenceParallel(self._tp)

    def attention(self, window: int | None) -> nn.Module:
        """Makes the attention for the method of context parallelism."""
        return self._attention(window)

    def attention_with_dropout(self, name: str, window: int | None) -> nn.Module | None:
        """Makes attention with dropout; None if the model has none."""
        rate = self._config.attention_dropout
        if not rate:
            return None
        # Each tp rank has different heads, so it draws different masks.
        stream = self._streams.stream(name, ("cp", "tp"))
        return AttentionWithDropout(rate, stream, window)

    def hidden_dropout(self, name: str) -> nn.Module | None:
        """Makes dropout of hidden states; None if the model has none."""
        rate = self._config.hidden_dropout
        if not rate:
            return None
        # Ranks with the same tokens must draw the same masks.
        cut_by: tuple[str, ...] = ("cp",)
        if self._tp.sequence_parallel:
            cut_by = ("cp", "tp")
        return Dropout(rate, self._streams.stream(name, cut_by))

    def expert_bias(self, num_experts: int, rate: float) -> ExpertBias:
        """Makes the bias that balances a router's choices."""
        return ExpertBias(num_experts, rate)

    def dispatcher(self, num_experts: int) -> Dispatcher:
        """Makes the dispatcher of tokens to experts."""
        experts = self._experts
        if experts.dispatcher == "alltoall":
            return AllToAllDispatcher(
                num_experts, experts.ep_group, experts.etp_group, experts.interleaver
            )
        return AllGatherDispatcher(num_experts, experts.ep_group, experts.etp_group)

    def aux_loss(self, kind: str, divisor: float, *, is_per_rank: bool) -> AuxLoss:
        """Makes an auxiliary loss; see `models.layers.LayerFactory`."""
        if not is_per_rank:
            # All tp ranks count the same loss, and the counts are summed over them.
            divisor *= self._tp.size
        return AuxLoss(kind, divisor)

    # ---- what depends on where tokens are

    def local_rows(self, tensor: Tensor) -> Tensor:
        """Returns the rows of the tokens with activations on this rank."""
        return collectives.local_rows(tensor, self._tp.sequence_group)

    def sum_over_tokens(self, tensor: Tensor) -> Tensor:
        """Sums in place over all ranks that share a microbatch."""
        return collectives.all_reduce(tensor, self._experts.token_group)
