"""Ends a run before its last step where its config has a limit for it.

Owns: the clock of training.max_duration_s. Must not know: checkpoints, other commands.
"""

import time
from collections.abc import Callable

from megatron_ray.commands import Command


def with_time_limit(
    poll: Callable[[], Command],
    max_duration_s: float | None,
    rank: int,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[], Command]:
    """Returns a `poll` that also ends the run `max_duration_s` seconds from now.

    The clock of rank 0 decides: the ranks agree on the strongest command, and so end at the
    same step.
    """
    if max_duration_s is None or rank != 0:
        return poll
    deadline = clock() + max_duration_s

    def poll_and_check() -> Command:
        command = poll()
        if clock() >= deadline:
            return max(command, Command.EXIT)
        return command

    return poll_and_check
