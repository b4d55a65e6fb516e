"""Decides whether a run may be rolled back, and what it leaves behind.

Owns: the limits of rollbacks, the same for jobs and for runs without a driver. Pure. Must
not know: Ray, torch, how a run is started again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ray.checkpoint.directory import CheckpointInfo
from megatron_ray.checkpoint.records.rollbacks import Rollback


@dataclass(frozen=True)
class RollbackPlan:
    """What follows when a rule rolls a run back."""

    rollback: Rollback | None
    """What to record; None: the run ends."""
    step: int = 0
    """Step of the newest checkpoint that the run may go on from; 0: there is none."""
    refusal: str = ""
    """Why the run ends."""


def plan_rollback(
    attempt: int,
    facts: Mapping[str, int],
    message: str,
    earlier: Sequence[Rollback],
    checkpoints: Sequence[CheckpointInfo],
    max_rollbacks: int,
) -> RollbackPlan:
    """Returns what follows when a rule rolls an attempt back.

    `facts` are those of a RollbackError, `earlier` the rollbacks of the run so far. The
    one of this very attempt may be among them, when it was recorded before.
    """
    others = [rollback for rollback in earlier if rollback.attempt != attempt]
    if len(others) >= max_rollbacks:
        refusal = f"after the {len(others)} rollbacks of training.max_rollbacks; raise it"
        return RollbackPlan(None, refusal=refusal)
    rollback = Rollback(
        attempt, facts["step"], facts["leave_out"], facts["max_step"], message
    )
    steps = []
    for info in checkpoints:
        if info.committed and not any(
            other.leaves_behind(info.attempt, info.step) for other in others
        ):
            steps.append((info.step, rollback.leaves_behind(info.attempt, info.step)))
    usable = [step for step, is_behind in steps if not is_behind]
    # To begin anew would cost everything that the checkpoints were saved for.
    if steps and not usable:
        oldest = min(step for step, _ in steps)
        refusal = (
            f"no checkpoint is of step {rollback.max_step} or before, the oldest is of step "
            f"{oldest}; lower back_steps of the rule, or raise checkpoint.keep_last"
        )
        return RollbackPlan(None, refusal=refusal)
    return RollbackPlan(rollback, max(usable, default=0))
