"""Collects the answers of actors that come in time.

Must not know: what the calls do, what follows a missing answer.
"""

from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from workers.ray.deaths import raise_if_fenced


def results_in_time(
    calls: Mapping[Any, int], timeout_s: float
) -> tuple[dict[int, Any], tuple[int, ...]]:
    """Returns the results that arrive in time, by slot, and slots of failed calls.

    `calls` maps references to slots. The processes of failed calls are most likely
    dead. Raises FencedError.
    """
    if not calls:
        return {}, ()
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    results = {}
    failed = []
    for call in done:
        slot = calls[call]
        try:
            results[slot] = ray.get(call)
        except RayTaskError as error:
            raise_if_fenced(error)
            failed.append(slot)
        except RayError:
            failed.append(slot)
    return results, tuple(failed)
