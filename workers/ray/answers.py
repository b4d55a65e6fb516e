"""Collects the answers of actors: all of them, or those that come in time.

Must not know: what the calls do, what follows a missing answer.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from workers.decisions.failures import FailureKind
from workers.exceptions import WorkersError
from workers.ray.deaths import Death, death_of, raise_if_fenced

_STOP_CHECK_S = 0.2


class WorkerGroupError(WorkersError):
    """Some workers did not start.

    `dead_slots` must be created anew; `kind` is the kind of their failure.
    """

    def __init__(
        self,
        message: str,
        dead_slots: Iterable[int] = (),
        kind: FailureKind = FailureKind.START,
    ) -> None:
        super().__init__(message)
        self.dead_slots = tuple(dead_slots)
        self.kind = kind


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


def all_results(
    calls: Mapping[int, Any], timeout_s: float, stop: Callable[[], None]
) -> list[Any]:
    """Returns the results of calls by slot, in slot order.

    `stop` may raise to end the wait. Raises WorkerGroupError when any call fails or is
    late, FencedError.
    """
    _await_all(calls, timeout_s, stop)
    # All calls are examined before raising, so that the error contains every dead slot.
    results = []
    dead = {}
    for slot in sorted(calls):
        try:
            results.append(ray.get(calls[slot]))
        except RayTaskError as error:
            raise_if_fenced(error)
            dead[slot] = Death(FailureKind.START, str(error.cause))
        except RayError as error:
            dead[slot] = death_of(error)
    if dead:
        slot, death = next(iter(dead.items()))
        raise WorkerGroupError(f"slot {slot}: {death.message}", dead, death.kind)
    return results


def _await_all(
    calls: Mapping[int, Any], timeout_s: float, stop: Callable[[], None]
) -> None:
    deadline = time.monotonic() + timeout_s
    waiting = list(calls.values())
    while waiting and time.monotonic() < deadline:
        # Short waits, so that a cancelled job need not wait for its workers.
        stop()
        remaining_s = max(0.0, deadline - time.monotonic())
        _, waiting = ray.wait(
            waiting, num_returns=len(waiting), timeout=min(_STOP_CHECK_S, remaining_s)
        )
    late = [slot for slot, call in calls.items() if call in waiting]
    if late:
        raise WorkerGroupError(f"slots {late} did not reply within {timeout_s:g} s", late)
