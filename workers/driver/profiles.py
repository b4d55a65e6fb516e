"""Has ranks of a running attempt profile some of their steps.

Owns: passing a request on to the ranks that it names, once, and their reports. Must not
know: Ray, HTTP, torch, how a profile is made.
"""

from collections.abc import Iterable
from dataclasses import asdict

from megatron_ray.commands import ProfileRequest
from megatron_ray.reports import ProfileReport
from workers.driver.attempt.plan import AttemptListener, AttemptPlan
from workers.driver.ports import JobPorts
from workers.protocol.wire import DesiredJob, ProfileOrder
from workers.rank.spool import Line

ANSWER_S = 3.0
"""Seconds within which ranks answer that they have the request."""


class ProfileRequests:
    """The profiles of one attempt."""

    def __init__(
        self, plan: AttemptPlan, ports: JobPorts, listener: AttemptListener
    ) -> None:
        self._plan = plan
        self._ports = ports
        self._listener = listener
        # A driver that has restarted passes the newest request on again, which changes
        # nothing in the ranks that have it.
        self._last_number = 0

    def apply(self, desired: DesiredJob | None) -> None:
        """Passes a new request on. Raises FencedError."""
        if desired is None or desired.profile is None:
            return
        order = desired.profile
        # A request of an earlier attempt has ended with it.
        if order.number <= self._last_number or order.attempt != self._plan.attempt:
            return
        self._last_number = order.number
        slots = {}
        for place in self._plan.places:
            if place.rank in order.ranks:
                slots[place.slot] = place.rank
        request = ProfileRequest(order.first_step, order.last_step, order.number)
        taken = self._ports.group.profile(slots, self._plan.fence, request, ANSWER_S)
        asked = {slots[slot] for slot in taken}
        for rank in order.ranks:
            if rank not in asked:
                self._refuse(rank, order, rank in slots.values())

    def take(self, lines: Iterable[Line]) -> None:
        """Has the reports of profiles among a rank's reports recorded."""
        for line in lines:
            if line.kind == ProfileReport.kind:
                self._listener.profiled(line.value()["data"])

    def _refuse(self, rank: int, order: ProfileOrder, exists: bool) -> None:
        problem = f"the attempt has {len(self._plan.places)} ranks, numbered from 0"
        if exists:
            problem = f"it has not answered within {ANSWER_S:g} s, or has ended"
        report = ProfileReport(
            rank, order.number, order.first_step, order.last_step, problem=problem
        )
        self._listener.profiled(asdict(report))
