"""What a model asks its layers to be. Owns: the protocol between the model and whoever knows the layout. Must not know: any layout.

A model names full sizes; the factory answers with layers that may hold a part.
"""

from typing import Protocol

from torch import Tensor, nn


class Head(Protocol):
    """Output head: loss for training, logits for inference."""

    def __call__(self, hidden_TH: Tensor, labels_T: Tensor, mask_T: Tensor) -> Tensor: ...

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """[T, vocabulary]."""
        ...


class QKV(Protocol):
    """Projection to queries, keys and values: [T, inputs] -> [T, (heads + 2 groups) x head_width], of the heads held here."""

    heads: int
    """Query heads here."""
    groups: int
    """Key/value heads here."""

    def __call__(self, x_TH: Tensor) -> Tensor: ...


class Layers(Protocol):
    """Makes each layer of a model from its full size."""

    def embedding(self, width: int) -> nn.Module:
        """Token ids [T] -> [T, width]."""
        ...

    def position_embedding(self, rows: int, width: int) -> nn.Module:
        """Position ids [T] -> [T, width]."""
        ...

    def norm(self, width: int) -> nn.Module:
        """[T, width] -> [T, width]."""
        ...

    def column(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """[T, inputs] -> [T, outputs], outputs cut over tp."""
        ...

    def qkv(self, inputs: int, heads: int, groups: int, head_width: int, bias: bool) -> QKV:
        """[T, inputs] -> queries, keys and values of the heads here."""
        ...

    def row(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """([T, inputs cut over tp], residual [T, outputs]) -> [T, outputs]."""
        ...

    def attention(self) -> nn.Module:
        """(q [B, N, S, D], k and v [B, G, S, D], Packed or None) -> causal attention [B, N, S, D], over whole sequences."""
        ...

    def hidden_dropout(self, place: str) -> nn.Module | None:
        """A `Dropout` of hidden states as they are held here: ([T, width], first sample) -> [T, width]. None: nothing is dropped."""
        ...

    def dropping_attention(self, place: str) -> nn.Module | None:
        """As `attention`, with dropout on its probabilities: (q, k, v, (documents or None, first sample)). None: nothing is dropped."""
        ...

    def head(self, width: int, embedding: nn.Module | None) -> nn.Module:
        """A `Head`; shares the embedding's weight when one is given."""
        ...
