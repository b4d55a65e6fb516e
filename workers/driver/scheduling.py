"""Waits until a job may run and has its resources.

Owns: the phase READY, and the placement of every attempt. Must not know: admission,
what runs on the resources.
"""

from dataclasses import replace
from typing import Any

from megatron_ray.checkpoint.directory import CheckpointInfo
from megatron_ray.checkpoint.resume_point import (
    MixedRunsError,
    NoWholeCheckpointError,
    choose_resume_point,
)
from megatron_ray.parallel_dims import ParallelDims
from workers.decisions import elasticity
from workers.decisions.elasticity import Shortage
from workers.decisions.journal_entry import Phase
from workers.decisions.observations import (
    NothingToResume,
    Placed,
    PlacementTimedOut,
    RunRequested,
    StopRequested,
)
from workers.decisions.placement import Bundle, PlacementPlan, plan_placement
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

    def full_plan(self) -> PlacementPlan:
        """Returns the plan of the placement group, recomputed after a restart."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def attempt_plan(self) -> PlacementPlan:
        """Returns the plan of the attempt: a part of the placement group after a shrink."""
        plan = self.full_plan()
        dp = self._job.entry.dp
        if dp is None:
            return plan
        spec = elasticity.with_dp(self._job.spec, dp)
        bundles = self._available(plan)[: elasticity.islands_of(spec)]
        return plan.restricted_to(ParallelDims.of(spec.parallel), bundles)

    def place(self) -> Placed | NothingToResume | PlacementTimedOut | StopRequested:
        """Waits until the placement group is ready, and records what it waits for.

        Called before every attempt, because after a failure Ray may be moving bundles
        away from a lost node.
        """
        job = self._job
        clock = job.ports.clock
        self._resize()
        plan = self._make_plan()
        # The accelerator is chosen once, so that a job never moves from GPUs to CPUs.
        if plan.accelerator != job.entry.accelerator:
            job.write(accelerator=plan.accelerator)
        placement_group = self._group.placement_group(plan)
        began = clock()
        explain_at = began + _FIRST_EXPLANATION_S
        limit_s = job.spec.resources.placement_timeout_s
        # Ray reports no reason for pending placement groups, so requested resources are
        # compared with those of the nodes.
        while not self._is_ready(placement_group, plan):
            stop = job.stop_requested()
            if stop is not None:
                return stop
            now = clock()
            dp = self._shrunk_dp(plan, now - began)
            if dp is not None:
                return self._place_at(plan, dp)
            if now > explain_at:
                explain_at = now + _EXPLAIN_EVERY_S
                plan = self._make_plan()
                self._explain(plan, is_first=now - began < _EXPLAIN_EVERY_S)
            if now - began > limit_s:
                message = f"not placed within {limit_s:g} s: {plan.explanation}"
                return PlacementTimedOut(message, job.revision)
        return self._place_at(plan, None)

    # ---- other sizes

    def _resize(self) -> None:
        """Applies a size that the service desires: the job gets another placement group.

        The ranks have been freed. Repeated by a restarted driver until nothing of the old
        size is left.
        """
        job = self._job
        dp = job.resized_dp()
        if dp is not None:
            message = f"from dp={job.spec.parallel.dp} to dp={dp}"
            job.records.event("job.resized", message, data={"dp": dp})
            spec = elasticity.with_dp(job.spec, dp).model_dump(mode="json")
            # The processes of the old size end with their placement group.
            job.write(spec=spec, dp=None, ranks=(), store=None, lost_nodes=())
        bundles = self._group.num_bundles()
        tp = job.spec.parallel.tp
        if bundles not in (None, elasticity.islands_of(job.spec)):
            self._group.remove_all(bundles * (tp + 1))

    def _is_ready(self, placement_group: Any, plan: PlacementPlan) -> bool:
        """Whether every bundle can be used; waits for a moment if not."""
        if not placement_group.wait(_TURN_S):
            return False
        # Ray may list a bundle as ready whose node has just been lost.
        if not self._is_elastic or len(self._available(plan)) == len(plan.bundles):
            return True
        self._job.ports.outbox.wait(_TURN_S)
        return False

    @property
    def _is_elastic(self) -> bool:
        """Whether the job may go on without what it has lost."""
        return self._job.spec.elastic is not None and bool(self._job.entry.ranks)

    def _available(self, plan: PlacementPlan) -> list[Bundle]:
        """Returns the bundles on nodes that are alive, those with living ranks first."""
        job = self._job
        lost = set(job.entry.lost_nodes)
        alive = {node.node_id for node in job.ports.read_nodes() if node.alive}
        with_ranks = {
            place.bundle for place in job.entry.ranks if place.slot in self._group.slots
        }
        nodes = self._group.nodes(plan)
        available = [
            bundle for bundle in plan.bundles if nodes.get(bundle.index) in alive - lost
        ]
        available.sort(key=lambda bundle: (bundle.index not in with_ranks, bundle.index))
        return available

    def _shrunk_dp(self, plan: PlacementPlan, waited_s: float) -> int | None:
        """Returns a size at which the job can go on at once; None: it waits."""
        if not self._is_elastic or self._job.entry.phase is not Phase.RECOVERING:
            return None
        available = len(self._available(plan))
        shortage = Shortage(len(plan.bundles), available, plan.capacity, waited_s)
        return elasticity.shrunk_dp(self._job.spec, shortage)

    def _place_at(self, plan: PlacementPlan, dp: int | None) -> Placed | NothingToResume:
        """Uses the placement group, or the part of it that another size needs."""
        job = self._job
        self._plan = plan
        self._journal_nodes(plan)
        if dp is not None and dp != job.entry.dp:
            full = job.spec.parallel.dp
            message = f"goes on with dp={dp} instead of {full}, without the lost nodes"
            job.records.event("job.shrunk", message, "warn", {"dp": dp, "full_dp": full})
        elif dp is None and job.entry.dp is not None:
            message = f"back from dp={job.entry.dp} to dp={job.spec.parallel.dp}"
            job.records.event("job.grown", message, data={"dp": job.spec.parallel.dp})
        observation = self._choose_checkpoint()
        if isinstance(observation, Placed):
            return replace(observation, dp=dp)
        return observation

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
        lost = job.entry.lost_nodes
        nodes = [node for node in job.ports.read_nodes() if node.node_id not in lost]
        return plan_placement(job.spec, nodes, job.entry.accelerator)

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
