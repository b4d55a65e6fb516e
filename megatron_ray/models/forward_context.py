"""Defines the context of a forward pass: its mode, and its microbatch's data.

Owns: the modes of a forward pass, and the context that every block receives. Must not
know: layers, ranks, groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

from megatron_ray.models.batch import Packed


class ForwardMode(Enum):
    """The pass that a forward belongs to.

    Layers decide by the mode and by nothing else: not by `nn.Module.training`, not by
    whether autograd is recording.

    ==============  ===================  ===============  =======================
    mode            drops (dropout,      reports routing  attaches losses, counts
                    expert capacity)                      tokens for expert biases
    ==============  ===================  ===============  =======================
    TRAIN           yes                  yes              yes
    CHECKPOINTED    yes                  yes              no
    RECOMPUTE       yes                  no               yes
    EVAL            no                   yes              no
    GENERATE        no                   yes              no
    ==============  ===================  ===============  =======================

    A region of layers that is recomputed runs as CHECKPOINTED in the forward pass and
    as RECOMPUTE in the backward pass, everything else of a training step as TRAIN. So
    each layer does everything in the table exactly once a microbatch, whatever is
    recomputed.
    """

    TRAIN = "train"
    """A training forward that keeps its activations."""
    CHECKPOINTED = "checkpointed"
    """The first run of a recomputed region: its activations are discarded, and no
    gradient flows through it."""
    RECOMPUTE = "recompute"
    """The second run of such a region, in the backward pass."""
    EVAL = "eval"
    """A validation loss."""
    GENERATE = "generate"
    """Logits for the next token."""

    @property
    def is_training(self) -> bool:
        """Whether dropout is applied and full experts drop tokens."""
        return self not in (ForwardMode.EVAL, ForwardMode.GENERATE)

    @property
    def is_first_run(self) -> bool:
        """Whether the layers have not run on this microbatch before."""
        return self is not ForwardMode.RECOMPUTE

    @property
    def attaches_losses(self) -> bool:
        """Whether the backward pass goes through this very run.

        Auxiliary and MTP losses are attached and tokens per expert counted in such runs
        only.
        """
        return self in (ForwardMode.TRAIN, ForwardMode.RECOMPUTE)


@dataclass(frozen=True)
class ForwardContext:
    """The data of a microbatch that a block needs besides its activations."""

    mode: ForwardMode
    batch_size: int
    seq_length: int
    """Tokens of each sequence; under context parallelism those of this rank."""
    cos: Tensor | None
    """[B or 1, S, 1, D], as `rope.rotary_angles` makes it; None without rotary
    positions."""
    sin: Tensor | None
    packed: Packed | None = None
    """The documents, where they are kept apart."""
    routing_replay: Tensor | None = None
    """[T, layers, K]: experts that routers take instead of choosing."""
    on_route: Callable[[int, Tensor], None] | None = None
    """Called with (layer, experts [tokens of this rank, K]) for every router's choice,
    once a microbatch."""
    first_sample: int | None = None
    """Number within the run of the first sample, by which dropout draws its masks."""
    is_output_needed: bool = True
    """False where only the gradients of a run are of use, so that the product that
    makes its output may be left out."""

    @property
    def dropout_sample(self) -> int:
        """The sample by which dropout draws its masks.

        Raises ValueError when the batch has none: batches of a training step must.
        """
        if self.first_sample is None:
            raise ValueError("training with dropout needs batches that have a first_sample")
        return self.first_sample

    def for_first_run(self) -> "ForwardContext":
        """Returns the context for the first run of a recomputed region."""
        return replace(self, mode=ForwardMode.CHECKPOINTED)

    def for_recompute(self) -> "ForwardContext":
        """Returns the context for the second run of a recomputed region."""
        return replace(self, mode=ForwardMode.RECOMPUTE)

    def without_output(self) -> "ForwardContext":
        """Returns the context for a run whose output is not used."""
        return replace(self, is_output_needed=False)
