"""Maintains spare processes, which replace dead ranks at once.

Owns: when a spare is started, whether it is alive, when to give up. Must not know:
HTTP, torch, what follows a death.

Each node of the job gets one spare once there is something to resume from. A spare
has imported everything, so it replaces a dead rank in a fraction of a second. Called
between a running attempt's turns, so no call may block for long.
"""

from workers.decisions.placement import PlacementPlan
from workers.decisions.slot_assignment import spares_to_start
from workers.driver.context import JobContext

FIRST_SPARE_AFTER_S = 10.0
"""Seconds of training before the first spare starts: a short job needs none, and at first
the ranks need the CPU."""
CHECK_INTERVAL_S = 10.0
"""Seconds between checks, well below the time after which a worker that gets no calls
ends itself."""
_ANSWER_S = 0.1
_BOOT_S = 120.0
"""A spare that has not answered for this long counts as dead."""
_MAX_DEATHS = 3


class SparePool:
    """The spares of one attempt."""

    def __init__(self, job: JobContext, plan: PlacementPlan) -> None:
        self._job = job
        self._group = job.ports.group
        self._clock = job.ports.clock
        self._plan = plan
        self._next_check = self._clock() + FIRST_SPARE_AFTER_S
        self._deaths = 0
        self._silent_since: dict[int, float] = {}

    def maintain(self) -> None:
        """Replaces dead spares when it is time for a check. Raises FencedError."""
        job = self._job
        now = self._clock()
        # Without a checkpoint or copies an attempt starts over, so a fast replacement
        # saves little.
        has_saved = job.entry.last_commit > 0 or job.keeps_copies
        is_enabled = job.spec.restart.standby and has_saved
        if now < self._next_check or not is_enabled:
            return
        self._next_check = now + CHECK_INTERVAL_S
        nodes = self._nodes_with_spares(now)
        # Spares that keep dying probably lack memory; starting more would make it
        # worse.
        if self._deaths >= _MAX_DEATHS:
            self._next_check = float("inf")
            message = (
                f"spare processes disabled after {self._deaths} crashes; replacements now "
                "start a new process"
            )
            job.records.event("spares.disabled", message, "warn")
        elif nodes is not None:
            spares = spares_to_start(self._plan, job.entry.ranks, self._group.slots, nodes)
            if spares:
                self._group.create(self._plan, spares, job.spec.resources.num_threads)

    def _nodes_with_spares(self, now: float) -> set[str] | None:
        """Returns the nodes with a living spare; None while one is still starting.

        Dead ones are ended, which frees their slots.
        """
        spares = self._job.unmapped_slots()
        living, dead = self._group.look_up(spares, self._job.fence, _ANSWER_S)
        silent = set(spares).difference(dead)
        nodes = set()
        for facts in living:
            silent.discard(facts.slot)
            nodes.add(facts.node_id)
        late = self._late(silent, now)
        lost = [*dead, *late]
        self._group.kill_slots(lost)
        self._deaths += len(lost)
        # The node of a spare that is still importing torch is unknown.
        if silent.difference(late):
            return None
        return nodes

    def _late(self, silent: set[int], now: float) -> list[int]:
        """Returns silent spares that had enough time to start."""
        silent_since = {}
        late = []
        for slot in silent:
            silent_since[slot] = self._silent_since.get(slot, now)
            if now - silent_since[slot] > _BOOT_S:
                late.append(slot)
        self._silent_since = silent_since
        return late
