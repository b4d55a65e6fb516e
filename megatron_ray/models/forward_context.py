"""Defines the context of a forward pass: its mode and the data of its microbatch.

Owns: the modes of a forward pass, and the context that every block receives. Must not
know: layers, ranks, groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

from megatron_ray.models.batch import Packed


class ForwardMode(Enum):
    """The kind of a forward pass.

    Layers decide by the mode only, neither by `nn.Module.training` nor by whether
    autograd is recording.

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

    A recomputed region of layers runs as CHECKPOINTED in the forward pass and as
    RECOMPUTE in the backward pass; all other layers of a training step run as TRAIN. So
    each layer performs each action of the table exactly once per microbatch.
    """

    TRAIN = "train"
    """A training forward that keeps its activations."""
    CHECKPOINTED = "checkpointed"
    """The first run of a recomputed region: activations are discarded, no gradient is
    computed."""
    RECOMPUTE = "recompute"
    """The second run of such a region, in the backward pass."""
    EVAL = "eval"
    """A forward pass for a validation loss."""
    GENERATE = "generate"
    """A forward pass for the logits of the next token."""

    @property
    def is_training(self) -> bool:
        """Whether dropout is applied and experts drop tokens beyond their capacity."""
        return self not in (ForwardMode.EVAL, ForwardMode.GENERATE)

    @property
    def is_first_run(self) -> bool:
        """Whether this is the layers' first run on the microbatch."""
        return self is not ForwardMode.RECOMPUTE

    @property
    def attaches_losses(self) -> bool:
        """Whether the backward pass uses the graph of this run.

        Only such runs attach auxiliary and MTP losses and count tokens per expert.
        """
        return self in (ForwardMode.TRAIN, ForwardMode.RECOMPUTE)


@dataclass(frozen=True)
class ForwardContext:
    """The inputs of a block other than its activations."""

    mode: ForwardMode
    batch_size: int
    seq_length: int
    """Tokens of each sequence; under context parallelism those of this rank."""
    cos: Tensor | None
    """[B or 1, S, 1, D], as `rope.rotary_angles` makes it; None without rotary
    positions."""
    sin: Tensor | None
    packed: Packed | None = None
    """The documents, if they are separated."""
    routing_replay: Tensor | None = None
    """[T, layers, K]: experts that replace the routers' choice."""
    on_route: Callable[[int, Tensor], None] | None = None
    """Called once per microbatch and router with (layer, experts [tokens of this rank,
    K])."""
    first_sample: int | None = None
    """Number of the first sample within the run, which seeds dropout masks."""
    is_output_needed: bool = True
    """False if only the gradients of a run are used, so that the last product may be
    skipped."""

    @property
    def dropout_sample(self) -> int:
        """The sample that seeds dropout masks.

        Raises ValueError for a batch without it; batches of training steps must have
        it.
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
        """Returns the context for a run with unused output."""
        return replace(self, is_output_needed=False)
