"""Plain functions as Ray tasks on CPU. Owns: how they are sent and how their failures
read.

Must not know: what they do.
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
    """A task that raised or whose process died; the text is one sentence."""


def anywhere(body: Callable[..., Any], *args: Any) -> Any:
    """Runs a function on any node; it waits for no resources, so a full cluster still
    answers.

    Returns the reference.
    """
    return _remote(body).options(num_cpus=0, scheduling_strategy="SPREAD").remote(*args)


def on_node(node_id: str, body: Callable[..., Any], *args: Any) -> Any:
    """Runs a function on one node, once, without asking for resources; returns the
    reference.
    """
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return (
        _remote(body)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
        .remote(*args)
    )


@cache
def _remote(body: Callable[..., Any]) -> Any:
    """Ray's handle on a function; made once, since each is sent to Ray's head and kept."""
    return ray.remote(body)


def is_done(call: Any) -> bool:
    """Whether the result (or failure) is there."""
    return bool(ray.wait([call], timeout=0)[0])


def end(call: Any) -> None:
    """Ends the task's process unless it is done; nothing of it runs on."""
    if not is_done(call):
        ray.cancel(call, force=True)
        ray.wait([call], timeout=_END_S)


def result(call: Any) -> Any:
    """The result. Raises TaskFailedError."""
    try:
        return ray.get(call)
    except RayTaskError as error:
        raise TaskFailedError(f"{type(error.cause).__name__}: {error.cause}") from error
    except RayError as error:
        raise TaskFailedError(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def result_or_none(call: Any, timeout_s: float) -> Any | None:
    """The result; None when it failed or is late."""
    try:
        return ray.get(call, timeout=timeout_s)
    except (RayError, GetTimeoutError):
        return None
