"""Whether a run may be rolled back, as a table."""

import pytest

from megatron_ray.checkpoint.directory import CheckpointInfo, RunIdentity
from megatron_ray.checkpoint.records.rollbacks import Rollback
from workers.decisions.faults.rollbacks import plan_rollback

FACTS = {"step": 21, "leave_out": 2, "max_step": 16}


def checkpoint(step: int, attempt: int = 2, *, committed: bool = True) -> CheckpointInfo:
    path = f"/runs/job/checkpoints/step-{step:08d}-a{attempt:04d}"
    return CheckpointInfo(
        step, attempt, path, committed, None, False, RunIdentity("job"), None, 1
    )


EARLIER = Rollback(attempt=1, step=9, leave_out=1, max_step=7)
OWN = Rollback(attempt=2, step=21, leave_out=2, max_step=16, message="why")


@pytest.mark.parametrize(
    ("earlier", "steps", "max_rollbacks", "step", "refusal"),
    [
        ([], [(10, 1), (15, 2), (20, 2)], 1, 15, ""),
        ([], [(10, 1), (16, 2)], 1, 16, ""),
        ([], [], 1, 0, ""),
        (
            [],
            [(17, 1), (20, 2)],
            1,
            0,
            "no checkpoint is of step 16 or before, the oldest is",
        ),
        ([EARLIER], [(5, 1), (8, 1)], 2, 5, ""),
        ([EARLIER], [(8, 1), (20, 2)], 2, 0, "the oldest is of step 20"),
        ([EARLIER], [(5, 1)], 1, 0, "after the 1 rollbacks of training.max_rollbacks"),
        ([], [(5, 1)], 0, 0, "after the 0 rollbacks of training.max_rollbacks"),
        # Recorded by a driver that died before it went on.
        ([EARLIER, OWN], [(5, 1)], 2, 5, ""),
    ],
)
def test_a_rollback_goes_to_the_newest_checkpoint_that_is_old_enough(
    earlier: list[Rollback],
    steps: list[tuple[int, int]],
    max_rollbacks: int,
    step: int,
    refusal: str,
) -> None:
    checkpoints = [checkpoint(*each) for each in steps]
    checkpoints.append(checkpoint(12, committed=False))
    plan = plan_rollback(2, FACTS, "why", earlier, checkpoints, max_rollbacks)
    assert refusal in plan.refusal
    assert bool(plan.refusal) is bool(refusal)
    assert plan.step == step
    assert plan.rollback == (None if refusal else OWN)
