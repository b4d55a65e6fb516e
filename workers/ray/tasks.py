"""Runs plain functions as Ray tasks on CPU.

Owns: how they are submitted and how their failures are reported. Must not know: what they
do.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.exceptions import WorkersError

_END_S = 5.0


class TaskFailedError(WorkersError):
    """A task raised or its process died; the message is one sentence."""


def anywhere(body: Callable[..., Any], *args: Any) -> Any:
    """Runs a function on any node; returns the reference to its result.

    It reserves no resources, so it runs on a full cluster too.
    """
    return _remote(body).options(num_cpus=0, scheduling_strategy="SPREAD").remote(*args)


def on_node(node_id: str, body: Callable[..., Any], *args: Any) -> Any:
    """Runs a function on one node, at most once; returns the reference to its result.

    It reserves no resources.
    """
    # Not soft: on another node the task would read the wrong files.
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = _remote(body).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
    return task.remote(*args)


@cache
def _remote(body: Callable[..., Any]) -> Any:
    """Returns Ray's handle on a function."""
    # Cached per function, because each handle is sent to Ray's head and kept there.
    return ray.remote(body)


def is_done(call: Any) -> bool:
    """Returns whether the task has ended, by result or failure."""
    done, _ = ray.wait([call], timeout=0)
    return bool(done)


def end(call: Any) -> None:
    """Kills the task's process unless the task is done, and waits for its end."""
    # `force` kills the worker process, because an exception cannot interrupt native code
    # such as a tokenizer.
    if not is_done(call):
        ray.cancel(call, force=True)
        ray.wait([call], timeout=_END_S)


def result(call: Any) -> Any:
    """Returns the task's result. Raises TaskFailedError."""
    try:
        return ray.get(call)
    except RayTaskError as error:
        raise TaskFailedError(f"{type(error.cause).__name__}: {error.cause}") from error
    except RayError as error:
        # Ray appends pages of advice to the first line.
        reason = str(error).partition("\n")[0]
        raise TaskFailedError(f"{type(error).__name__}: {reason}") from error


def result_or_none(call: Any, timeout_s: float) -> Any | None:
    """Returns the task's result, or None if it failed or is late."""
    try:
        return ray.get(call, timeout=timeout_s)
    except (RayError, GetTimeoutError):
        return None
