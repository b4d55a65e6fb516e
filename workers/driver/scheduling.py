"""Waits until a job may run and has its resources.

Owns: the phase READY, and the placement of every attempt. Must not know: admission,
what runs on the resources.
"""

from collections.abc import Collection

from megatron_ray.checkpoint.directory import CheckpointInfo
from megatron_ray.checkpoint.resume_point import (
    MixedRunsError,
    NoWholeCheckpointError,
    choose_resume_point,
)
from workers.decisions.observations import (
    NothingToResume,
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
    """Acquires and releases the resources of one job."""

    def __init__(self, job: JobContext) -> None:
        self._job = job
        self._group = job.ports.group
        self._plan: PlacementPlan | None = None

    def release(self) -> None:
        """Carries out a journaled release, if any, and records the state."""
        released = self._job.entry.given_back
        if released is None:
            return
        # The state is recorded after the release, because admission then reassigns the
        # resources.
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
        # A request that is not newer than the release is the one that the release
        # carried out.
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
        """Returns the plan of the last placement, recomputed after a restart."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def place(self) -> Placed | NothingToResume | PlacementTimedOut | StopRequested:
        """Waits until the placement group is ready, and records what it waits for.

        Called before every attempt, because after a failure Ray may be moving bundles
        away from a lost node.
        """
        job = self._job
        clock = job.ports.clock
        plan = self._make_plan()
        # The accelerator is chosen once, so that a job never moves from GPUs to CPUs.
        if plan.accelerator != job.entry.accelerator:
            job.write(accelerator=plan.accelerator)
        self._leave(plan.avoid_nodes)
        placement_group = self._group.placement_group(plan)
        began = clock()
        explain_at = began + _FIRST_EXPLANATION_S
        limit_s = job.spec.resources.placement_timeout_s
        # Ray reports no reason for pending placement groups, so requested resources are
        # compared with those of the nodes.
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
        return self._choose_checkpoint()

    def _leave(self, node_ids: Collection[str]) -> None:
        """Ends the job's processes and its placement group if it lies on such a node.

        Ray moves no bundle away from a node that is alive. Processes on other nodes end
        with the group, which costs less than waiting until Ray counts the node as dead.
        """
        if node_ids and self._group.lies_on(node_ids):
            self._group.remove_all(self._job.num_slots)

    def _choose_checkpoint(self) -> Placed | NothingToResume:
        """Chooses the checkpoint to resume from; records those that cannot be loaded."""
        job = self._job
        try:
            point = choose_resume_point(job.job_dir, self._find_damage)
        except (NoWholeCheckpointError, MixedRunsError) as error:
            return NothingToResume(str(error))
        for item in point.passed_over:
            # An unfinished one is what every failed attempt may leave.
            if item.info.was_committed or item.info.lacks_marker:
                message = f"the checkpoint cannot be loaded and is passed over: {item}"
                job.records.event("checkpoint.damaged", message, "error")
        newest = point.checkpoint
        if newest is None and job.entry.last_commit > 0:
            message = (
                f"the checkpoint of step {job.entry.last_commit} was committed, and none is in "
                f"{job.job_dir} any more; restore it and resume the job, or submit the spec as a "
                "new job to begin at step 0"
            )
            return NothingToResume(message)
        if newest is None:
            return Placed(job.ports.code_version, None)
        return Placed(job.ports.code_version, newest.path, newest.step)

    def _find_damage(self, info: CheckpointInfo) -> str | None:
        """Returns what ranks of earlier attempts have read; the driver reads no tensors."""
        return info.damage or self._job.entry.damaged.get(info.path)

    def _make_plan(self) -> PlacementPlan:
        job = self._job
        return plan_placement(job.spec, job.read_nodes(), job.entry.accelerator)

    def _explain(self, plan: PlacementPlan, *, is_first: bool) -> None:
        """Records what the job waits for: once, or repeatedly if it can never fit."""
        level = "info"
        if not plan.is_feasible:
            level = "warn"
        if is_first or not plan.is_feasible:
            self._job.records.event("placement.waiting", plan.explanation, level)

    def _journal_nodes(self, plan: PlacementPlan) -> None:
        """Adds the job's nodes to the journal, for the clean-up."""
        known = self._job.entry.nodes
        nodes = {*known, *self._group.nodes(plan).values()}
        if len(nodes) > len(known):
            self._job.write(nodes=tuple(sorted(nodes)))
