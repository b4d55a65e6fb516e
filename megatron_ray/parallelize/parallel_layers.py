"""The `local` spec: layers on plain torch, for any device.

Owns: which class fills which slot. Must not know: who builds what when.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_ray.config.model import ModelConfig
from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.distributed.rng import Streams
from megatron_ray.expert_parallel.dispatch import AllGatherDispatcher, AllToAllDispatcher
from megatron_ray.expert_parallel.layers import ExpertBias, GroupedLinear, RouterLinear
from megatron_ray.models.aux_loss import AuxLoss
from megatron_ray.models.dropout import AttentionWithDropout, Dropout
from megatron_ray.models.layers import Dispatcher
from megatron_ray.sharding.parameters import padded_vocabulary
from megatron_ray.tensor_parallel.cross_entropy import VocabParallelHead
from megatron_ray.tensor_parallel.layers import (
    ColumnParallelLinear,
    GatherFromSequenceParallel,
    PositionEmbedding,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron_ray.tensor_parallel.norm import LayerNorm, RMSNorm


@dataclass(frozen=True)
class ExpertParallelGroups:
    """Who has which experts, and how tokens get there."""

    ep_group: Group = None
    etp_group: Group = None
    token_group: Group = None
    """Who holds tokens of the same microbatch."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"


class ParallelLayerFactory:
    """`models.layers.Layers` for a tensor-parallel group (None: one rank)."""

    def __init__(
        self,
        config: ModelConfig,
        group: Group,
        tp: int,
        *,
        sequence_parallel: bool,
        dtype: torch.dtype,
        experts: ExpertParallelGroups,
        streams: Streams,
        attention: Callable[[int | None], nn.Module],
    ) -> None:
        self.config = config
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.dtype = dtype
        self.experts = experts
        self._attention = attention
        self._streams = streams
        self.rows = padded_vocabulary(config, tp)

    def embedding(self, width: int, uses: int) -> nn.Module:
        found = VocabParallelEmbedding(
            self.rows,
            width,
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
        )
        found.uses = uses
        return found

    def position_embedding(self, rows: int, width: int) -> nn.Module:
        return PositionEmbedding(
            rows,
            width,
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
        )

    def norm(self, width: int) -> nn.Module:
        config = self.config
        group = self.group
        sequence_parallel = self.sequence_parallel
        dtype = self.dtype
        if config.norm == "layernorm":
            return LayerNorm(
                width,
                config.norm_eps,
                group=group,
                sequence_parallel=sequence_parallel,
                dtype=dtype,
            )
        centred = config.zero_centered_norm
        return RMSNorm(
            width,
            config.norm_eps,
            group=group,
            sequence_parallel=sequence_parallel,
            dtype=dtype,
            zero_centered=centred,
        )

    def column(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        return ColumnParallelLinear(
            inputs,
            outputs,
            bias=bias,
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
        )

    def replicated(self, inputs: int, outputs: int) -> nn.Module:
        return ReplicatedLinear(
            inputs,
            outputs,
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
        )

    def shared_by_heads(self) -> nn.Module:
        return GatherFromSequenceParallel(self.group, self.sequence_parallel)

    def qkv(
        self, inputs: int, heads: int, groups: int, head_width: int, bias: bool
    ) -> QKVParallelLinear:
        return QKVParallelLinear(
            inputs,
            heads,
            groups,
            head_width,
            bias=bias,
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
        )

    def row(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        return RowParallelLinear(
            inputs,
            outputs,
            bias=bias,
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
        )

    def attention(self, window: int | None) -> nn.Module:
        return self._attention(window)

    def router(self, width: int, num_experts: int) -> nn.Module:
        return RouterLinear(
            width,
            num_experts,
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
        )

    def expert_column(self, num_experts: int, inputs: int, outputs: int) -> nn.Module:
        local = num_experts // collectives.size(self.experts.ep_group)
        return GroupedLinear(
            local,
            inputs,
            outputs // collectives.size(self.experts.etp_group),
            dtype=self.dtype,
        )

    def expert_row(self, num_experts: int, inputs: int, outputs: int) -> nn.Module:
        local = num_experts // collectives.size(self.experts.ep_group)
        return GroupedLinear(
            local,
            inputs // collectives.size(self.experts.etp_group),
            outputs,
            dtype=self.dtype,
        )

    def expert_bias(self, num_experts: int, rate: float) -> ExpertBias:
        return ExpertBias(num_experts, rate)

    def dispatcher(self, num_experts: int) -> Dispatcher:
        kind = (
            AllToAllDispatcher
            if self.experts.dispatcher == "alltoall"
            else AllGatherDispatcher
        )
        return kind(num_experts, self.experts.ep_group, self.experts.etp_group)

    def attached_loss(self, kind: str, divisor: float, *, of_own_tokens: bool) -> AuxLoss:
        return AuxLoss(
            kind, divisor if of_own_tokens else divisor * collectives.size(self.group)
        )

    def own_rows(self, tensor: Tensor) -> Tensor:
        return collectives.local_rows(
            tensor, self.group if self.sequence_parallel else None
        )

    def sum_over_tokens(self, tensor: Tensor) -> Tensor:
        return collectives.all_reduce(tensor, self.experts.token_group)

    def hidden_dropout(self, place: str) -> nn.Module | None:
        cut_by = ("cp", "tp") if self.sequence_parallel else ("cp",)
        rate = self.config.hidden_dropout
        return Dropout(rate, self._streams.stream(place, cut_by)) if rate else None

    def dropping_attention(self, place: str, window: int | None) -> nn.Module | None:
        rate = self.config.attention_dropout
        return (
            AttentionWithDropout(rate, self._streams.stream(place, ("cp", "tp")), window)
            if rate
            else None
        )

    def head(self, width: int, embedding: nn.Module | None, uses: int) -> nn.Module:
        tied = embedding.weight if embedding is not None else None
        found = VocabParallelHead(
            self.rows,
            width,
            self.config.vocabulary,
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
            tied=tied,  # type: ignore[arg-type]
        )
        found.uses = uses
        return found
