"""Examines all ranks of a running attempt at one moment.

Owns: asking them in parallel, the deadline, ranks that do not answer. Must not know: Ray,
HTTP, torch, why it is asked, what follows.

The training threads go on meanwhile, if they can: other threads of their processes
answer. A rank that does not answer in time is evidence, too.
"""

from collections.abc import Mapping

from workers.decisions.faults.failing_storage import waits_for_storage
from workers.decisions.ranks.diagnosis import RankEvidence, diagnose
from workers.decisions.ranks.diagnosis_report import Examined, report_of
from workers.driver.attempt.plan import AttemptPlan
from workers.driver.ports import JobPorts

ANSWER_S = 3.0
"""Seconds within which ranks answer; then they count as silent."""
OUTSIDE_S = 4.0
"""Seconds for the stacks of silent ranks, which another process takes."""


class Autopsy:
    """The examinations of one attempt. Raises FencedError."""

    def __init__(self, plan: AttemptPlan, ports: JobPorts) -> None:
        self._plan = plan
        self._group = ports.group

    def examine(self, quiet_s: float, *, is_hang: bool) -> Examined:
        """Returns what the ranks do now, and which one the others wait for.

        `quiet_s` are the seconds since any rank has reported anything.
        """
        by_slot = self._group.inspect(self._plan.fence, ANSWER_S)
        evidence = {}
        for place in self._plan.places:
            evidence[place.rank] = by_slot.get(place.slot)
        diagnosis = diagnose(evidence, quiet_s, is_hang=is_hang)
        report = report_of(
            diagnosis,
            evidence,
            self._plan.places,
            self._outside_stacks(evidence),
            quiet_s=quiet_s,
            is_hang=is_hang,
        )
        stalled = waits_for_storage(evidence, diagnosis.culprits)
        return Examined(diagnosis, report, waits_for_storage=stalled)

    def _outside_stacks(
        self, evidence: Mapping[int, RankEvidence | None]
    ) -> dict[int, str]:
        """Returns stacks of silent ranks, by rank, taken by a neighbour on their node."""
        neighbours = {}
        for place in self._plan.places:
            if evidence[place.rank] is not None:
                neighbours[place.node_id] = place.slot
        pids = {}
        rank_of = {}
        # One rank of each node, because a process takes one stack at a time.
        for place in self._plan.places:
            slot = neighbours.get(place.node_id)
            if evidence[place.rank] is None and slot is not None and slot not in pids:
                pids[slot] = place.pid
                rank_of[place.pid] = place.rank
        if not pids:
            return {}
        stacks = self._group.stacks_from_outside(pids, self._plan.fence, OUTSIDE_S)
        return {rank_of[pid]: text for pid, text in stacks.items() if text}
