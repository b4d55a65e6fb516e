"""Decides which ranks are slow: whose own work takes longer than that of their peers.

Owns: the window, the comparison, the hysteresis. Pure: times come in as values. Must not
know: Ray, torch, clocks.

All ranks of a job make steps at the pace of the slowest, so a step's time names none. A
rank's own time is that of its steps without its waits in collectives; it is compared with
the median of the ranks of the same pipeline stage, which do the same work.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median_low

WINDOW_S = 10.0
"""Shortest time over which ranks are compared."""
WINDOW_STEPS = 5
"""Fewest steps of a window: a single one may write a checkpoint."""
SLOW_RATIO = 1.3
"""A rank whose own time is above this multiple of its group's median is slow ..."""
RECOVERED_RATIO = 1.15
"""... until it is below this one."""
MIN_SHARE = 0.05
"""Share of the step that the difference must cost; less is not worth an event."""
WINDOWS = 3
"""Windows in a row that decide."""


@dataclass(frozen=True)
class Pace:
    """The steps of one rank in this attempt, and their seconds."""

    steps: int = 0
    own_s: float = 0.0
    """Without waits for other ranks."""
    step_s: float = 0.0


@dataclass(frozen=True)
class SlowRank:
    """How much slower a rank is than its group."""

    rank: int
    own_s: float
    """Its own seconds per step."""
    median_s: float
    """The median of its group."""

    @property
    def ratio(self) -> float:
        """The multiple of the median."""
        return self.own_s / self.median_s


@dataclass(frozen=True)
class StragglerWatch:
    """The windows so far, and the ranks that are slow now."""

    groups: tuple[tuple[int, ...], ...]
    """Ranks that do the same work; a group of one has none to compare with."""
    started_at: float
    begin: Mapping[int, Pace] = field(default_factory=dict)
    """The paces at the beginning of the window."""
    slow: Mapping[int, SlowRank] = field(default_factory=dict)
    streaks: Mapping[int, int] = field(default_factory=dict)
    """Windows in a row in which a rank was on the other side than it is counted on."""

    def observed(self, now: float, paces: Mapping[int, Pace]) -> "StragglerWatch":
        """Returns the watch after the newest paces of all ranks, by rank.

        It is the same while the window is not over.
        """
        is_new = any(
            paces[rank].steps < pace.steps
            for rank, pace in self.begin.items()
            if rank in paces
        )
        if not self.begin or is_new:
            return replace(self, started_at=now, begin=dict(paces))
        if now - self.started_at < WINDOW_S or not self._is_long_enough(paces):
            return self
        slow = dict(self.slow)
        streaks: dict[int, int] = {}
        for group in self.groups:
            for rank, compared in self._compared(group, paces).items():
                self._judge(rank, compared, slow, streaks)
        return replace(self, started_at=now, begin=dict(paces), slow=slow, streaks=streaks)

    def _is_long_enough(self, paces: Mapping[int, Pace]) -> bool:
        for rank, pace in self.begin.items():
            if rank not in paces or paces[rank].steps - pace.steps < WINDOW_STEPS:
                return False
        return True

    def _compared(
        self, group: Iterable[int], paces: Mapping[int, Pace]
    ) -> dict[int, tuple[SlowRank, float]]:
        """Returns each rank against its group, with the seconds of its whole steps."""
        own = {}
        whole = {}
        for rank in group:
            if rank not in paces or rank not in self.begin:
                continue
            before = self.begin[rank]
            num_steps = paces[rank].steps - before.steps
            own[rank] = (paces[rank].own_s - before.own_s) / num_steps
            whole[rank] = (paces[rank].step_s - before.step_s) / num_steps
        if len(own) < 2:
            return {}
        # Of two ranks it is the faster one, which the slower is compared with.
        median_s = max(median_low(own.values()), 1e-9)
        compared = {}
        for rank, own_s in own.items():
            compared[rank] = SlowRank(rank, own_s, median_s), whole[rank]
        return compared

    def _judge(
        self,
        rank: int,
        compared: tuple[SlowRank, float],
        slow: dict[int, SlowRank],
        streaks: dict[int, int],
    ) -> None:
        now, step_s = compared
        costs = now.own_s - now.median_s >= MIN_SHARE * step_s
        has_changed = now.ratio > SLOW_RATIO and costs
        if rank in self.slow:
            has_changed = now.ratio < RECOVERED_RATIO or not costs
        if has_changed:
            streaks[rank] = self.streaks.get(rank, 0) + 1
        if streaks.get(rank, 0) >= WINDOWS:
            del streaks[rank]
            if rank in slow:
                del slow[rank]
            else:
                slow[rank] = now
        elif rank in slow:
            slow[rank] = now


def describe_slow(slow: SlowRank, address: str) -> str:
    """Returns the event's sentence for a rank that has become slow."""
    return (
        f"rank {slow.rank} on {address} is slow: its own work takes {slow.own_s * 1e3:.1f} ms "
        f"a step, {slow.ratio:.1f} times the median of its pipeline stage "
        f"({slow.median_s * 1e3:.1f} ms); all others wait for it"
    )
