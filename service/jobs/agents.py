"""Tracks the agents: when each was last in contact, and the checks it has been sent.

Used on the event loop only and kept in memory: after a restart of the service an agent
counts as lost until its next request. Must not know: the database, HTTP.
"""

import asyncio
import time
import uuid
from dataclasses import dataclass
from typing import Any

from megatron_ray.config.problem import Problem
from workers.protocol.wire import CheckRequest


@dataclass(frozen=True)
class CheckedPaths:
    """What the agent answers to a check."""

    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    """What of the data is left out, one sentence each."""


CheckFuture = asyncio.Future[CheckedPaths]


class Agents:
    """The agents, one per cluster; the service's monotonic clock decides who is live."""

    def __init__(self, lost_s: float) -> None:
        self._lost_s = lost_s
        self._last_contact: dict[str, float] = {}
        self._checks: dict[str, dict[str, PathCheck]] = {}
        """Open checks by cluster and check id."""

    def record_contact(self, cluster: str) -> None:
        """Notes that the agent has just sent a request."""
        self._last_contact[cluster] = time.monotonic()

    def silence_s(self, cluster: str) -> float | None:
        """Returns seconds since the agent's last request; None before its first one."""
        # Monotonic, so that a clock change does not make all agents look lost.
        last_contact = self._last_contact.get(cluster)
        if last_contact is None:
            return None
        return time.monotonic() - last_contact

    def live_clusters(self) -> list[str]:
        """Returns the clusters whose agents are live, by name."""
        return list(filter(self.is_live, sorted(self._last_contact)))

    def is_live(self, cluster: str) -> bool:
        """Whether the agent has been in contact recently."""
        silence_s = self.silence_s(cluster)
        return silence_s is not None and silence_s < self._lost_s

    def open_checks(self, cluster: str) -> tuple[CheckRequest, ...]:
        """Returns the checks that the agent has not answered yet."""
        requests = []
        for check in self._checks.get(cluster, {}).values():
            requests.append(check.request)
        return tuple(requests)

    def start_check(self, cluster: str, **fields: Any) -> "PathCheck":
        """Adds a check of a resolved spec's paths to the agent's next long poll.

        `fields` are those of CheckRequest. The caller must wake the long poll.
        """
        request = CheckRequest(check_id=f"check-{uuid.uuid4().hex[:12]}", **fields)
        # Made on the event loop, where the submission waits and the result arrives.
        future: CheckFuture = asyncio.get_running_loop().create_future()
        check = PathCheck(self, cluster, request, future)
        # It stays listed until it is over, so an agent that restarts finds it again.
        self._checks.setdefault(cluster, {})[request.check_id] = check
        return check

    def finish_check(self, check_id: str, checked: CheckedPaths) -> None:
        """Passes the agent's result to the submission, if it is still waiting."""
        for checks in self._checks.values():
            check = checks.get(check_id)
            # The agent may send a result twice: the first one counts.
            if check is not None and not check.future.done():
                check.future.set_result(checked)

    def forget_check(self, check: "PathCheck") -> None:
        """Removes a check whose request has stopped waiting for it."""
        self._checks.get(check.cluster, {}).pop(check.request.check_id, None)


@dataclass(frozen=True)
class PathCheck:
    """A check of a spec's paths from inside the cluster."""

    agents: Agents
    cluster: str
    request: CheckRequest
    future: CheckFuture

    async def result(self, timeout_s: float) -> CheckedPaths | None:
        """Returns the agent's result; None when it did not answer in time.

        The check is over either way.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self.future
        except TimeoutError:
            return None
        finally:
            self.agents.forget_check(self)
