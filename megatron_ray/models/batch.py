"""One microbatch as tensors.

Owns: the types that a model's forward pass takes as input. Must not know: where samples
come from.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Several documents in one sample, each by itself: nobody sees another document's
    tokens.
    """

    documents_BS: Tensor
    """int32 number of the document that a token belongs to, within its row; of whole
    sequences, also where a rank has only a part."""
    lengths: tuple[tuple[int, ...], ...]
    """Tokens of each document, by row; on the host."""


@dataclass(frozen=True)
class MTPTargets:
    """What is to be predicted beyond the next token, by depth: D of them.

    Tokens without such a label count for nothing.
    """

    labels_DBS: Tensor
    """At depth d the token d + 2 further on. The last ones of a sample lack one and
    have some token in its place."""
    loss_mask_DBS: Tensor
    """fp32"""


@dataclass(frozen=True)
class Batch:
    """One microbatch.

    Shapes: B samples, S tokens of each (under context parallelism: those of this rank).
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    """fp32; 0 where a token does not count."""
    position_ids: Tensor
    """[B, S], or [1, S] for all rows alike."""
    num_tokens: int
    """Sum of the mask, known without asking the device."""
    packed: Packed | None = None
    """Given where documents are kept apart."""
    further: MTPTargets | None = None
    """Given where the model predicts further tokens."""
    routing_replay: Tensor | None = None
    """[B, S, layers, experts per token] int64: what routers are to take instead of
    choosing (replay)."""
    first_sample: int | None = None
    """Number within the run of the first sample: what dropout draws by. None: nothing
    is dropped (evaluation)."""
