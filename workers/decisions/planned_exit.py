"""Names the limit of a spec at which a run has ended.

Owns: the words for it, the same for jobs and for runs without a driver. Pure.
"""

from collections.abc import Mapping
from typing import Any


def reached_limit(training: Mapping[str, Any], step: int) -> str:
    """Returns the field by which a run has ended after a step.

    `training` is that section of its spec, as JSON.
    """
    every = training.get("exit_every_steps")
    if every and step % every == 0:
        return "training.exit_every_steps"
    return "training.max_duration_s"
