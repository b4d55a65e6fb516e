"""Decides when an agent that serves a cluster of one job has nothing left to do.

Owns: the jobs that this agent has served, and its exit code. Pure. Must not know: Ray,
HTTP, clocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from workers.protocol.states import JobState

EXIT_SERVED = 0
EXIT_NOT_SUCCEEDED = 1
NO_JOB_S = 60.0
"""Time without a job after which an agent that has served none gives up."""
LEFTOVERS_S = 30.0
"""Time that drivers of ended jobs have for exiting by themselves."""


@dataclass
class Idleness:
    """The jobs of the cluster as the service last sent them."""

    _served: set[str] = field(default_factory=set)
    _states: Mapping[str, JobState] = field(default_factory=dict)
    _idle_since: float | None = None

    def set_states(self, states: Mapping[str, JobState]) -> None:
        """Stores the state of the cluster's jobs: all that are active, and ended ones."""
        self._states = states
        for job_id, state in states.items():
            if not state.is_terminal:
                self._served.add(job_id)

    def exit_code(self, now: float, *, has_actors: bool) -> int | None:
        """Returns the code to exit with, or None while there is something to do.

        `has_actors`: whether drivers or ranks are left on the cluster.
        """
        for state in self._states.values():
            if not state.is_terminal:
                self._idle_since = None
                return None
        if self._idle_since is None:
            self._idle_since = now
        idle_s = now - self._idle_since
        if not self._served and idle_s < NO_JOB_S:
            return None
        if has_actors and idle_s < LEFTOVERS_S:
            return None
        # A deleted job is not listed any more.
        ends = set(map(self._states.get, self._served))
        if ends == {JobState.SUCCEEDED}:
            return EXIT_SERVED
        return EXIT_NOT_SUCCEEDED
