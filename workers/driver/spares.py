"""Processes that stand by.

Owns: when one is made, whether it still lives, when to give up making them.

One per node of the job, once there is a checkpoint to go back to: it has imported
everything, so a dead rank's place is filled at once. Called between a running attempt's
turns; nothing here waits long. Must not know: HTTP, torch, what follows a death.
"""

import time

from workers.decisions.placement import PlacementPlan
from workers.decisions.slot_assignment import spares_to_start
from workers.driver.context import JobContext
from workers.ray.worker_group import WorkerGroup

AFTER_S = 10.0
"""Of running, before one is made: a short job needs none, and the first seconds belong
to the ranks."""
EVERY_S = 10.0
"""Well below the time after which a worker that nobody calls ends itself."""
_ANSWER_S = 0.1
_BOOT_S = 120.0
_MOST_DEATHS = 3


class SparePool:
    """Of one attempt."""

    def __init__(self, job: JobContext, group: WorkerGroup, plan: PlacementPlan) -> None:
        self._job = job
        self._group = group
        self._plan = plan
        self._next = time.monotonic() + AFTER_S
        self._deaths = 0
        self._silent_since: dict[int, float] = {}

    def maintain(self) -> None:
        """Looks after them when it is time. Raises Fenced."""
        job = self._job
        now = time.monotonic()
        if now < self._next or not job.spec.restart.standby or not job.entry.last_commit:
            return
        self._next = now + EVERY_S
        standing = self._standing(now)
        if self._deaths >= _MOST_DEATHS:
            self._next = float("inf")
            text = (
                f"no process stands by any more: {self._deaths} of them died; a dead rank's "
                "successor now starts from nothing"
            )
            job.say.event("standby.given_up", text, "warn")
        elif standing is not None:
            wanted = spares_to_start(
                self._plan, job.entry.ranks, self._group.slots, standing.values()
            )
            if wanted:
                self._group.create(self._plan, wanted, job.spec.resources.num_threads)

    def _standing(self, now: float) -> dict[int, str] | None:
        """The node of each that stands by; None while one is still coming up.

        Those that are dead are forgotten.
        """
        serving = {place.slot for place in self._job.entry.ranks}
        others = [slot for slot in self._group.slots if slot not in serving]
        found, dead = self._group.look_up(others, self._job.fence, _ANSWER_S)
        silent = set(others) - {facts.slot for facts in found} - set(dead)
        self._silent_since = {slot: self._silent_since.get(slot, now) for slot in silent}
        lost = [
            *dead,
            *(slot for slot, since in self._silent_since.items() if now - since > _BOOT_S),
        ]
        self._group.kill_slots(lost)
        self._deaths += len(lost)
        return (
            None
            if silent.difference(lost)
            else {facts.slot: facts.node_id for facts in found}
        )
