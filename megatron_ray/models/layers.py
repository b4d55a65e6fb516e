"""What a model asks its layers to be.

Owns: the protocol between the model and whoever knows the layout. Must not know: any
layout.

A model names full sizes; the factory answers with layers that may hold a part.
"""

from typing import Protocol

from torch import Tensor, nn

from megatron_ray.expert_parallel.dispatch import Capacity, Dispatched
from megatron_ray.expert_parallel.layers import ExpertBias
from megatron_ray.models.aux_loss import AuxLoss


class Head(Protocol):
    """Output head: loss for training, logits for inference."""

    def __call__(self, hidden_TH: Tensor, labels_T: Tensor, mask_T: Tensor) -> Tensor: ...

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """[T, vocabulary]."""
        ...


class Dispatcher(Protocol):
    """See expert_parallel.dispatch."""

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, capacity: Capacity) -> Dispatched:
        """Rows for the experts that are here, and the way back."""
        ...


class QKV(Protocol):
    """Projection to queries, keys and values: [T, inputs] -> [T, (heads + 2 groups) x
    head_width], of the heads held here.
    """

    heads: int
    """Query heads here."""
    groups: int
    """Key/value heads here."""

    def __call__(self, x_TH: Tensor) -> Tensor: ...


class Layers(Protocol):
    """Makes each layer of a model from its full size."""

    def embedding(self, width: int, uses: int) -> nn.Module:
        """Token ids [T] -> [T, width]; `uses`: how often a microbatch goes through it."""
        ...

    def position_embedding(self, rows: int, width: int) -> nn.Module:
        """Position ids [T] -> [T, width]."""
        ...

    def norm(self, width: int) -> nn.Module:
        """[T, width] -> [T, width]; of the residual stream, or of heads."""
        ...

    def column(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """[T, inputs] -> [T, outputs], outputs cut over tp."""
        ...

    def replicated(self, inputs: int, outputs: int) -> nn.Module:
        """[T, inputs] -> [T, outputs], for the tokens that are here."""
        ...

    def shared_by_heads(self) -> nn.Module:
        """[T, width] of the tokens that are here -> of all tokens of the sequences, for
        the heads of every tp rank.
        """
        ...

    def qkv(self, inputs: int, heads: int, groups: int, head_width: int, bias: bool) -> QKV:
        """[T, inputs] -> queries, keys and values of the heads here."""
        ...

    def row(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """([T, inputs cut over tp], residual [T, outputs]) -> [T, outputs]."""
        ...

    def attention(self, window: int | None) -> nn.Module:
        """(q [B, N, S, D], k and v [B, G, S, D], Packed or None) -> causal attention
        [B, N, S, D], over whole sequences or over the last `window` tokens of them.
        """
        ...

    def router(self, width: int, num_experts: int) -> nn.Module:
        """[T, width] -> logits [T, num_experts], at least fp32."""
        ...

    def expert_column(self, num_experts: int, inputs: int, outputs: int) -> nn.Module:
        """(rows expert by expert [R, inputs], rows of each expert here) -> [R,
        outputs], outputs cut over etp.
        """
        ...

    def expert_row(self, num_experts: int, inputs: int, outputs: int) -> nn.Module:
        """(rows [R, inputs cut over etp], rows of each expert here) -> [R, outputs], to
        be summed over etp on the way back.
        """
        ...

    def expert_bias(self, num_experts: int, rate: float) -> ExpertBias:
        """What balances the choice of experts without a loss; a step moves it by
        `rate`.
        """
        ...

    def dispatcher(self, num_experts: int) -> Dispatcher:
        """Brings tokens to their experts and back."""
        ...

    def attached_loss(self, kind: str, divisor: float, *, of_own_tokens: bool) -> AuxLoss:
        """See `AuxLoss`; `of_own_tokens`: each rank has its part, otherwise all tp
        ranks have the same.
        """
        ...

    def own_rows(self, tensor: Tensor) -> Tensor:
        """Of something per token of this rank's sequences, [T, ...]: the rows of those
        tokens whose activations are here.
        """
        ...

    def sum_over_tokens(self, tensor: Tensor) -> Tensor:
        """Sums in place over all who hold tokens of the same sequences, and returns it."""
        ...

    def hidden_dropout(self, place: str) -> nn.Module | None:
        """A `Dropout` of hidden states as they are held here: ([T, width], first
        sample) -> [T, width]. None: nothing is dropped.
        """
        ...

    def dropping_attention(self, place: str, window: int | None) -> nn.Module | None:
        """As `attention`, with dropout on its probabilities: (q, k, v, (documents or
        None, first sample)). None: nothing is dropped.
        """
        ...

    def head(self, width: int, embedding: nn.Module | None, uses: int) -> nn.Module:
        """A `Head`; shares the embedding's weight when one is given.

        `uses`: how often a microbatch goes through it.
        """
        ...
