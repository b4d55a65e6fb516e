"""Watches the paces of an attempt's ranks.

Owns: which ranks are compared, when, and the listener's calls. Must not know: the
comparison (`decisions.ranks.stragglers`), what follows.
"""

from collections.abc import Callable, Mapping

from workers.decisions.ranks.stragglers import WINDOW_S, Pace, StragglerWatch
from workers.driver.attempt.plan import AttemptListener, AttemptPlan


class StragglerMonitor:
    """The slow ranks of one attempt."""

    def __init__(
        self, plan: AttemptPlan, listener: AttemptListener, clock: Callable[[], float]
    ) -> None:
        self._places = {place.rank: place for place in plan.places}
        self._listener = listener
        self._clock = clock
        stages: dict[int, list[int]] = {}
        for place in plan.places:
            stages.setdefault(place.coordinates.get("pp", 0), []).append(place.rank)
        groups = tuple(map(tuple, stages.values()))
        slow = {slow.rank: slow for slow in plan.slow_ranks}
        self._watch = StragglerWatch(groups, clock(), slow=slow)

    def observe(self, paces: Callable[[], Mapping[int, Pace]]) -> None:
        """Compares the ranks when a window is over, and reports what has changed."""
        now = self._clock()
        # Most turns end here, so thousands of ranks cost nothing between two windows.
        if self._watch.begin and now - self._watch.started_at < WINDOW_S:
            return
        before = self._watch.slow
        self._watch = self._watch.observed(now, paces())
        after = self._watch.slow
        for rank in sorted(after.keys() - before.keys()):
            self._listener.slow(after[rank], self._places[rank])
        for rank in sorted(before.keys() - after.keys()):
            self._listener.recovered(before[rank], self._places[rank])
