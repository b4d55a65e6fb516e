"""Defines faults that are injected into the numbers of chosen steps.

Owns: which steps a fault strikes, on which rank, and for how long. Must not know: how a
step is computed, what rules make of its numbers.
"""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ray.config.base import Config


class FaultConfig(Config):
    """A fault of some steps, to rehearse what follows from it.

    The rank's part of the step's numbers becomes one that breaks a rule; gradients and
    weights stay as they are. Nothing is drawn: a step has its faults in every attempt. A
    step in training.skip_steps has none, nor one whose rules have no baseline yet.
    """

    kind: Literal["transient", "persistent", "correct"]
    """`transient` is gone when the step is computed again. `persistent` strikes then too,
    until the run has moved to other devices. `correct` strikes on every device, as the
    correct result of bad samples does. They are Megatron's --error-injection-type
    transient_error, persistent_error and correct_result."""
    breaks: Literal["not_finite", "loss_spike", "large_grad_norm"]
    """The rules that the step breaks, by their `when`: the loss becomes NaN, or the loss or
    the gradient norm about 1e30."""
    steps: tuple[Annotated[int, Field(ge=1, le=1 << 40)], ...] | None = Field(
        default=None, min_length=1, max_length=1024
    )
    """Steps that are struck, counted from 1."""
    every_steps: int | None = Field(default=None, ge=1, le=1 << 40)
    """Instead of `steps`: every step whose number is a multiple of this one is struck."""
    rank: int = Field(default=0, ge=0, lt=1 << 20)
    """Rank whose numbers are struck."""

    def is_due(self, step: int) -> bool:
        """Returns whether a step is one of those that are struck."""
        if self.every_steps is not None:
            return step % self.every_steps == 0
        return step in (self.steps or ())
