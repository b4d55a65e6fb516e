"""Watches whether a shrunk job can grow back.

Owns: since when the lost resources are back, how long steps and the last start took. Must
not know: what follows (`workers.decisions.elasticity` decides whether it pays), HTTP, torch.

Called between a running attempt's turns, so no call may block for long.
"""

from collections import deque
from statistics import median
from typing import Any

from workers.decisions import elasticity
from workers.decisions.elasticity import GrowthFacts
from workers.decisions.placement import PlacementPlan
from workers.driver.context import JobContext

CHECK_INTERVAL_S = 5.0
_STEPS = 20
"""Steps whose median is the time of a step."""


class Growth:
    """The chance of one attempt to go on at the full size of its job.

    `plan` is that of the whole placement group.
    """

    def __init__(self, job: JobContext, plan: PlacementPlan) -> None:
        self._job = job
        self._plan = plan
        self._clock = job.ports.clock
        now = self._clock()
        self._began_at = now
        self._next_check = now + CHECK_INTERVAL_S
        self._back_since: float | None = None
        self._restart_s: float | None = None
        self._step = 0
        self._step_s: deque[float] = deque(maxlen=_STEPS)
        self._reason: str | None = None

    def stepped(self, data: dict[str, Any]) -> None:
        """Processes a step of rank 0."""
        if self._restart_s is None:
            self._restart_s = self._clock() - self._began_at
        self._step = data["step"]
        self._step_s.append(data["step_s"])

    def reason(self) -> str | None:
        """Returns why the job grows now; None: it does not."""
        now = self._clock()
        if self._job.entry.dp is None or now < self._next_check or not self._step_s:
            return self._reason
        self._next_check = now + CHECK_INTERVAL_S
        if not self._is_back(now):
            self._back_since = None
            return None
        if self._back_since is None:
            self._back_since = now
        decision = elasticity.decide_growth(self._facts(now - self._back_since))
        if decision.grow:
            self._reason = decision.message
        return self._reason

    def _facts(self, steady_s: float) -> GrowthFacts:
        job = self._job
        dp = job.entry.dp
        full_dp = job.spec.parallel.dp
        assert isinstance(dp, int)
        assert isinstance(full_dp, int)
        return GrowthFacts(
            dp=dp,
            full_dp=full_dp,
            steady_s=steady_s,
            step_s=median(self._step_s),
            remaining_steps=job.spec.training.num_steps - self._step,
            restart_s=self._restart_s or 0.0,
        )

    def _is_back(self, now: float) -> bool:
        """Whether every bundle lies on a node that can be used."""
        job = self._job
        usable = {node.node_id for node in job.ports.read_nodes() if node.alive}
        # By then Ray has noticed if the node had died.
        if now - self._began_at < elasticity.SUSPECT_S:
            usable -= set(job.entry.lost_nodes)
        nodes = job.ports.group.nodes(self._plan)
        return all(nodes.get(bundle.index) in usable for bundle in self._plan.bundles)
