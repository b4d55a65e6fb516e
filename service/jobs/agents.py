"""Agents as the service knows them.

Owns: when each was last heard, and questions waiting for their answers.

Lives on the event loop and in memory: after a restart an agent counts as gone until it
speaks. Must not know: the database, HTTP.
"""

import asyncio
import time
import uuid
from typing import Any

from megatron_ray.config.problem import Problem
from workers.protocol.wire import CheckRequest


class Agents:
    """One agent per cluster; the receiver's monotonic clock decides who is there."""

    def __init__(self, lost_s: float) -> None:
        self._lost_s = lost_s
        self._heard: dict[str, float] = {}
        self._open: dict[
            str, dict[str, tuple[CheckRequest, asyncio.Future[tuple[Problem, ...]]]]
        ] = {}

    def heard(self, cluster: str) -> None:
        """The agent has just spoken."""
        self._heard[cluster] = time.monotonic()

    def silence_s(self, cluster: str) -> float | None:
        """Seconds since the agent spoke; None when it has not since the service
        started.
        """
        heard = self._heard.get(cluster)
        return None if heard is None else time.monotonic() - heard

    def is_live(self, cluster: str) -> bool:
        """Whether the agent counts as there."""
        silence = self.silence_s(cluster)
        return silence is not None and silence < self._lost_s

    def open_checks(self, cluster: str) -> tuple[CheckRequest, ...]:
        """Questions without an answer yet."""
        return tuple(request for request, _ in self._open.get(cluster, {}).values())

    def ask(self, cluster: str, spec: dict[str, Any], storage_path: str) -> "Question":
        """Puts a question where the agent's long poll finds it; the caller wakes the
        poll.
        """
        request = CheckRequest(
            check_id=f"check-{uuid.uuid4().hex[:12]}", spec=spec, storage_path=storage_path
        )
        future = asyncio.get_running_loop().create_future()
        self._open.setdefault(cluster, {})[request.check_id] = (request, future)
        return Question(self, cluster, request.check_id, future)

    def answer(self, check_id: str, problems: tuple[Problem, ...]) -> None:
        """Gives a question its answer; one that nobody waits for any more is dropped."""
        for waiting in self._open.values():
            if check_id in waiting and not waiting[check_id][1].done():
                waiting[check_id][1].set_result(problems)

    def forget(self, cluster: str, check_id: str) -> None:
        """Takes a question away."""
        self._open.get(cluster, {}).pop(check_id, None)


class Question:
    """One open question."""

    def __init__(
        self,
        agents: Agents,
        cluster: str,
        check_id: str,
        future: "asyncio.Future[tuple[Problem, ...]]",
    ) -> None:
        self._agents = agents
        self._cluster = cluster
        self._check_id = check_id
        self._future = future

    async def answer(self, timeout_s: float) -> tuple[Problem, ...] | None:
        """What the agent found; None when it did not say in time.

        The question is over either way.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._future
        except TimeoutError:
            return None
        finally:
            self._agents.forget(self._cluster, self._check_id)
