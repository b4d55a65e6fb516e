"""Defines one microbatch as tensors.

Owns: the types that a model's forward pass takes as input. Must not know: where samples
come from.

Shapes: B samples, S tokens of each (under context parallelism: those of this rank), D
depths of multi-token prediction (MTP).
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Several documents in one sample; a token attends to its own document only."""

    documents_BS: Tensor
    """int32 number of the document that a token belongs to, within its row; of whole
    sequences, also where a rank has only a part."""
    lengths: tuple[tuple[int, ...], ...]
    """Tokens of each document, by row; on the host."""


@dataclass(frozen=True)
class MTPTargets:
    """Labels of the tokens beyond the next one, by depth of multi-token prediction.

    Where a sample or a document ends too early to have such a label, the mask is 0.
    """

    labels_DBS: Tensor
    """Labels of the MTP layers: at depth d the token d + 2 places later. The last positions
    of a sample have no such token; theirs are arbitrary and masked."""
    loss_mask_DBS: Tensor
    """fp32; 0 where a label does not count."""


@dataclass(frozen=True)
class Batch:
    """One microbatch."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    """fp32; 0 where a token does not count."""
    position_ids: Tensor
    """[B, S], or [1, S] when all rows have the same."""
    num_tokens: int
    """Sum of the mask, known without asking the device."""
    packed: Packed | None = None
    """Set when documents are kept apart."""
    mtp_targets: MTPTargets | None = None
    """Set when the model has layers for multi-token prediction."""
    routing_replay: Tensor | None = None
    """[B, S, layers, experts per token] int64: experts that routers take instead of
    choosing."""
    first_sample: int | None = None
    """Number within the run of the first sample, by which dropout draws its masks. None
    outside of training steps."""
