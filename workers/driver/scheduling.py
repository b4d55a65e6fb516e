"""Waits until a job may run and has its resources.

Owns: the phase READY, and the placement of every attempt. Must not know: admission, what
runs in the resources.
"""

from megatron_ray.checkpoint.directory import latest_committed
from workers.decisions.job_phases import (
    Placed,
    PlacementTimedOut,
    RunRequested,
    StopRequested,
)
from workers.decisions.placement import PlacementPlan, plan_placement
from workers.driver.context import JobContext
from workers.protocol.states import DesiredState, JobState, StatusReason

_FIRST_EXPLANATION_S = 2.0
_EXPLAIN_EVERY_S = 15.0
_TURN_S = 0.2


class Scheduling:
    """Takes and releases the resources of one job."""

    def __init__(self, job: JobContext) -> None:
        self._job = job
        self._group = job.ports.group
        self._plan: PlacementPlan | None = None

    def release(self) -> None:
        """Carries out the release in the journal, if there is one, and records the state."""
        released = self._job.entry.given_back
        if released is None:
            return
        # The state follows the release: admission gives the room away on its word.
        self._group.remove_all(self._job.num_slots)
        reason = None
        if released.reason:
            reason = StatusReason(released.reason)
        self._job.records.state(JobState(released.state), reason, released.message)

    def await_run(self) -> RunRequested | StopRequested:
        """Waits for a request to run that is newer than the release."""
        job = self._job
        revision = -1
        if job.entry.given_back is not None:
            revision = job.entry.given_back.revision
        # A request that was already there when the resources were released is the one
        # that has just been carried out.
        while True:
            stop = job.stop_requested()
            if stop is not None:
                return stop
            desired = job.desired
            if (
                desired is not None
                and desired.desired is DesiredState.RUN
                and desired.revision > revision
            ):
                return RunRequested()
            job.ports.outbox.wait(1.0)

    def current_plan(self) -> PlacementPlan:
        """Returns the plan of the last placement, made again after a restart."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def place(self) -> Placed | PlacementTimedOut | StopRequested:
        """Waits until the placement group is ready, explaining what it waits for.

        Done before every attempt: after a failure Ray may be moving bundles away from a
        lost node.
        """
        job = self._job
        clock = job.ports.clock
        plan = self._make_plan()
        # The accelerator is chosen once: a job never moves from GPUs to CPUs.
        if plan.accelerator != job.entry.accelerator:
            job.write(accelerator=plan.accelerator)
        placement_group = self._group.placement_group(plan)
        began = clock()
        explain_at = began + _FIRST_EXPLANATION_S
        limit_s = job.spec.resources.placement_timeout_s
        # Ray gives no reason while it waits; the explanation comes from comparing what is
        # asked for with what the nodes have.
        while not placement_group.wait(_TURN_S):
            stop = job.stop_requested()
            if stop is not None:
                return stop
            now = clock()
            if now > explain_at:
                explain_at = now + _EXPLAIN_EVERY_S
                plan = self._make_plan()
                self._explain(plan, is_first=now - began < _EXPLAIN_EVERY_S)
            if now - began > limit_s:
                message = f"not placed within {limit_s:g} s: {plan.explanation}"
                return PlacementTimedOut(message, job.revision)
        self._plan = plan
        self._journal_nodes(plan)
        newest = latest_committed(job.job_dir)
        if newest is None:
            return Placed(job.ports.code_version, None)
        return Placed(job.ports.code_version, newest.path, newest.step)

    def _make_plan(self) -> PlacementPlan:
        job = self._job
        return plan_placement(job.spec, job.ports.read_nodes(), job.entry.accelerator)

    def _explain(self, plan: PlacementPlan, *, is_first: bool) -> None:
        """Records what the job waits for: once, and again while it can never be had."""
        level = "info"
        if not plan.is_feasible:
            level = "warn"
        if is_first or not plan.is_feasible:
            self._job.records.event("placement.waiting", plan.explanation, level)

    def _journal_nodes(self, plan: PlacementPlan) -> None:
        """Keeps every node that the job was ever placed on, for the clean-up."""
        known = self._job.entry.nodes
        nodes = {*known, *self._group.nodes(plan).values()}
        if len(nodes) > len(known):
            self._job.write(nodes=tuple(sorted(nodes)))
