"""Defines the tensors of one microbatch.

Owns: the input types of a model's forward pass. Must not know: the source of samples.

Shapes: B samples, S tokens of each (under context parallelism: those of this rank), D
depths of multi-token prediction (MTP).
"""

from dataclasses import dataclass
from itertools import chain

from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Several documents in one sample; a token attends to its own document only."""

    documents_BS: Tensor
    """int32 index of each token's document within its row; of whole sequences, also if
    a rank has only a part."""
    lengths: tuple[tuple[int, ...], ...]
    """Tokens of each document, by row; on the host."""
    cu_seqlens: Tensor
    """int32 [documents of all rows + 1] on the device: where each document starts, rows one
    after another, and where the last one ends."""

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(chain.from_iterable(self.lengths))


@dataclass(frozen=True)
class MTPTargets:
    """Labels of the tokens beyond the next one, by depth of multi-token prediction.

    The mask is 0 where a sample or document ends before such a label.
    """

    labels_DBS: Tensor
    """Labels of the MTP layers: at depth d the token d + 2 positions later. The last
    positions of a sample have no such token; their labels are arbitrary and masked."""
    loss_mask_DBS: Tensor
    """fp32; 0 for ignored labels."""


@dataclass(frozen=True)
class Batch:
    """One microbatch."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    """fp32; 0 for ignored tokens."""
    position_ids: Tensor
    """[B, S], or [1, S] when all rows have the same."""
    num_tokens: int
    """Sum of the mask, available on the host."""
    packed: Packed | None = None
    """Set when documents are separated."""
    mtp_targets: MTPTargets | None = None
    """Set when the model has multi-token prediction layers."""
    routing_replay: Tensor | None = None
    """[B, S, layers, experts per token] int64: experts that replace the routers'
    choice."""
    first_sample: int | None = None
    """Number of the first sample within the run, which seeds dropout masks. None
    outside of training steps."""
