"""Names, finds and kills a job's actors.

Owns: the names, derived from job and slot alone, so that a restarted driver finds the
actors of an earlier one. Must not know: HTTP, torch, what the actors do.
"""

import contextlib
from typing import Any

import ray
from ray.exceptions import RayError


def driver_name(job_id: str) -> str:
    """Returns the name of a job's driver actor."""
    return f"{job_id}/driver"


def worker_name(job_id: str, slot: int) -> str:
    """Returns the name of a slot's worker actor."""
    return f"{job_id}/w{slot}"


def find_actor(name: str, namespace: str) -> Any | None:
    """Returns the living actor of that name, or None."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None


def kill(actor: Any) -> None:
    """Kills an actor for good; does nothing if it is dead."""
    with contextlib.suppress(RayError, ValueError):
        ray.kill(actor, no_restart=True)
