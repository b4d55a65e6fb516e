"""Gathers what the ranks of an attempt measure before they train.

Owns: the measurements so far, and when the verdict is due. Must not know: the verdict
itself (`decisions.preflight.judgement`), what follows.
"""

from collections.abc import Sequence

from megatron_ray.reports import SpeedReport
from workers.decisions.placement import RankPlace
from workers.decisions.preflight.judgement import Limits, judge
from workers.decisions.preflight.measured_nodes import MeasuredNodes
from workers.decisions.preflight.orders import preflight_orders
from workers.decisions.preflight.speeds import RankSpeeds
from workers.decisions.preflight.verdict import Verdict
from workers.rank.spool import Line


class PreflightWatch:
    """The measurements of one attempt's ranks until the verdict."""

    def __init__(self, places: Sequence[RankPlace], limits: Limits) -> None:
        self._places = places
        self._limits = limits
        self._num_missing = 0
        self._speeds: dict[int, RankSpeeds] = {}
        orders = preflight_orders(MeasuredNodes(places).by_rank, limits.timeout_s)
        for place, order in zip(places, orders, strict=True):
            self._num_missing += len(order.parts)
            self._speeds[place.rank] = RankSpeeds(place.rank)
        self._has_begun = False
        self._is_broken = False

    def take(self, rank: int, lines: Sequence[Line]) -> None:
        """Adds the measurements among a rank's reports."""
        for line in lines:
            if line.kind != SpeedReport.kind:
                continue
            speeds = self._speeds[rank].with_report(line.value()["data"])
            self._speeds[rank] = speeds
            self._has_begun = True
            self._is_broken = self._is_broken or speeds.broken is not None
            self._num_missing -= 1

    def verdict(self, quiet_s: float) -> Verdict | None:
        """Returns the verdict once the ranks have measured all, or do not go on.

        `quiet_s` are the seconds since any rank has reported anything. The time until the
        first measurement is that of imports and of the rendezvous.
        """
        hangs = self._has_begun and quiet_s > self._limits.timeout_s
        if self._num_missing > 0 and not self._is_broken and not hangs:
            return None
        return judge(self._places, self._speeds, self._limits)
