"""Defines the rules that a step's numbers must keep.

Owns: what a rule compares, and what follows when a step breaks it. Must not know: how a
step is computed, checkpoints.
"""

from typing import Literal

from pydantic import Field

from megatron_ray.config.base import Config


class RuleConfig(Config):
    """A rule for the numbers of every step, and the action for a step that breaks it.

    Steps in training.skip_steps are not judged. Of several rules that a step breaks, the
    first one of the list counts. A step that breaks a rule never changes the weights.
    """

    when: Literal["not_finite", "loss_spike", "large_grad_norm"]
    """What breaks the rule: `not_finite` is a loss or gradient norm that is NaN or
    infinite, and in fp16 no overflow that only lowers the loss scale; `loss_spike` a loss
    and `large_grad_norm` a gradient norm, before clipping, that are finite and above
    `factor` times the baseline, or above `limit`."""
    action: Literal["skip", "stop", "rollback"]
    """`skip` leaves the step's samples out and goes on, at most
    training.max_skipped_steps times. `stop` saves a checkpoint of the state before the
    step and ends the job. `rollback` goes on from an earlier state, and leaves out the
    samples of the step when the run comes to it again, at most training.max_rollbacks
    times."""
    factor: float = Field(default=10.0, gt=1, le=2.0**64)
    """Multiple of the baseline above which a number breaks the rule."""
    baseline: Literal["first_max", "recent_median"] = "first_max"
    """What `factor` multiplies: `first_max` is the maximum of the run's first `samples`
    steps, as in Megatron-LM, `recent_median` the median of the last `samples` steps that
    broke no rule. No step breaks the rule before there are so many."""
    samples: int = Field(default=100, ge=1, le=10_000)
    """Number of steps in the baseline."""
    limit: float | None = Field(default=None, gt=0, le=2.0**64)
    """A number that the loss or norm must not exceed, instead of a multiple of a baseline;
    `factor`, `baseline` and `samples` are then left out."""
    back_steps: int = Field(default=1, ge=1, le=1 << 40)
    """`rollback` only: the run goes on from the newest checkpoint, or copy in the memory
    of peers, that was made at least so many steps before the end of the step that broke
    the rule, and before all steps that are left out. One step back is the state before
    that step, which is saved then."""
    leave_out: int = Field(default=1, ge=1, le=256)
    """`rollback` only: number of steps whose samples are left out, the last of which is
    the one that broke the rule."""
    rerun: bool = False
    """Whether the ranks compute the step again before anything follows, with the same
    weights and samples. If the rule is not broken again, the first result was a transient
    fault of the hardware, and the run goes on with the second."""

    before_reduction: bool = False
    """`not_finite` only: whether every rank also checks its own loss and gradients, before
    they are summed over replicas, so that messages about a step name the ranks whose own
    numbers are not finite. Each step then reads the gradients once more."""

    @property
    def name(self) -> str:
        """Identifies what the rule compares, and with what."""
        if self.when == "not_finite":
            return self.when
        if self.limit is not None:
            return f"{self.when}-limit-{self.limit:g}"
        return f"{self.when}-{self.baseline}-{self.samples}-{self.factor:g}"

    @property
    def has_baseline(self) -> bool:
        """Whether the rule compares with numbers of earlier steps."""
        return self.when != "not_finite" and self.limit is None

    @property
    def steps_back(self) -> int:
        """Steps that a rollback goes back at least."""
        return max(self.back_steps, self.leave_out)
