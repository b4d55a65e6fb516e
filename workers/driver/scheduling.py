"""Waits until a job may run and has its resources.

Owns: the phase READY, and the placement of every attempt. Must not know: admission,
what runs on the resources.
"""

from typing import Any

from megatron_ray.checkpoint.directory import CheckpointInfo, attempt_of
from megatron_ray.checkpoint.records.rollbacks import is_left_behind
from megatron_ray.checkpoint.resume_point import (
    MixedRunsError,
    NoWholeCheckpointError,
    choose_resume_point,
)
from megatron_ray.parallel_dims import ParallelDims
from workers.decisions import elasticity
from workers.decisions.cluster_growth import nodes_to_come
from workers.decisions.elasticity import Shortage
from workers.decisions.journal_entry import Phase
from workers.decisions.observations import (
    NothingToResume,
    Placed,
    PlacementTimedOut,
    RunRequested,
    StopRequested,
)
from workers.decisions.placement import PlacementPlan, plan_placement
from workers.decisions.topology.bundles import Bundle
from workers.driver.attempt.copy_choice import CopyChoice
from workers.driver.context import JobContext
from workers.protocol.events import EventType
from workers.protocol.states import DesiredState, JobState, StatusReason

_FIRST_EXPLANATION_S = 2.0
_EXPLAIN_EVERY_S = 15.0
_TURN_S = 0.2


class Scheduling:
    """Acquires and releases the resources of one job."""

    def __init__(self, job: JobContext) -> None:
        self._job = job
        self._group = job.ports.group
        self._copies = CopyChoice(job)
        self._plan: PlacementPlan | None = None
        self._placement: Any = None
        """The placement group that was requested last."""
        self._dp: int | None = None

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
            self._plan = self._plan_again()
        return self._plan

    def attempt_plan(self) -> PlacementPlan:
        """Returns the plan of the attempt: a part of the placement group after a shrink."""
        plan = self.full_plan()
        dp = self._job.entry.dp
        if dp is None:
            return plan
        dims = ParallelDims.of(elasticity.with_dp(self._job.spec, dp).parallel)
        bundles = self._available(plan)[: dims.world_size // plan.bundle_size]
        return plan.restricted_to(dims, bundles)

    def place(self) -> Placed | NothingToResume | PlacementTimedOut | StopRequested:
        """Waits until the placement group is ready, and records what it waits for.

        Called before every attempt, because after a failure Ray may be moving bundles
        away from a lost node.
        """
        self._resize()
        self._dp = None
        ended = self._await_resources()
        if ended is not None:
            return ended
        self._record_size()
        self._journal_nodes(self.full_plan())
        return self._choose_copies() or self._choose_checkpoint()

    def _await_resources(self) -> PlacementTimedOut | StopRequested | None:
        """Returns why the wait for the resources has ended without them, if it has."""
        job = self._job
        clock = job.ports.clock
        self._request()
        began = clock()
        explain_at = began + _FIRST_EXPLANATION_S
        limit_s = job.spec.resources.placement_timeout_s
        # Ray reports no reason for pending placement groups, so requested resources are
        # compared with those of the nodes.
        while not self._is_placed():
            stop = job.stop_requested()
            if stop is not None:
                return stop
            now = clock()
            self._dp = self._shrunk_dp(now - began)
            if self._dp is not None:
                return None
            if now > explain_at:
                explain_at = now + _EXPLAIN_EVERY_S
                self._look_again(is_first=now - began < _EXPLAIN_EVERY_S)
            if now - began > limit_s:
                explanation = self.full_plan().explanation
                message = f"not placed within {limit_s:g} s: {explanation}"
                return PlacementTimedOut(message, job.revision)
        return None

    def _request(self) -> None:
        """Requests the resources from Ray, unless they are requested already."""
        job = self._job
        if self._group.is_requested:
            plan = self._plan_again()
        else:
            plan = self._make_plan(None)
        # The accelerator is chosen once, so that a job never moves from GPUs to CPUs; the
        # bundles are those of the placement group.
        chosen = (plan.accelerator, plan.bundle_size)
        if chosen != (job.entry.accelerator, job.entry.bundle_size):
            job.write(accelerator=plan.accelerator, bundle_size=plan.bundle_size)
        self._plan = plan
        self._placement = self._group.placement_group(plan)

    def _request_anew(self, reason: str) -> None:
        """Requests the resources once more, on other nodes; ends the job's processes."""
        job = self._job
        message = f"the resources are requested anew: {reason}"
        job.records.event("placement.moved", message, "warn")
        # The old map goes with the processes: Ray assigns the new ones other GPUs.
        job.write(ranks=(), store=None)
        self._group.remove_all(job.num_slots)
        self._request()

    def _is_placed(self) -> bool:
        """Waits a moment for the placement group; returns whether it is ready."""
        if not self._placement.wait(_TURN_S):
            return False
        # Nodes may have to be avoided since the request.
        latest = self._plan_again()
        used = set(self._group.nodes(latest).values())
        refused = used.intersection(latest.avoid_nodes)
        if not refused:
            return self._has_all(latest)
        self._request_anew(latest.node_reasons[min(refused)])
        return False

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
            job.records.event(EventType.JOB_RESIZED, message, data={"dp": dp})
            spec = elasticity.with_dp(job.spec, dp).model_dump(mode="json")
            # The processes of the old size end with their placement group.
            job.write(spec=spec, dp=None, ranks=(), store=None, lost_nodes=())
        bundles = self._group.num_bundles()
        dims = ParallelDims.of(job.spec.parallel)
        size = job.entry.bundle_size or dims.tp
        if bundles is not None and bundles * size != dims.world_size:
            # As many as there may be of the old size: a rank and a spare for each.
            self._group.remove_all(2 * bundles * size)

    @property
    def _is_elastic(self) -> bool:
        """Whether the job may go on without what it has lost."""
        return self._job.spec.elastic is not None and bool(self._job.entry.ranks)

    def _has_all(self, plan: PlacementPlan) -> bool:
        """Whether no bundle is on a node that was just lost; Ray lists those as ready."""
        if not self._is_elastic or len(self._available(plan)) == len(plan.bundles):
            return True
        self._job.ports.outbox.wait(_TURN_S)
        return False

    def _available(self, plan: PlacementPlan) -> list[Bundle]:
        """Returns the bundles of whole islands on living nodes, those with ranks first."""
        job = self._job
        alive = {node.node_id for node in job.ports.read_nodes() if node.alive}
        alive.difference_update(job.entry.lost_nodes)
        living = set()
        for place in job.entry.ranks:
            if place.slot in self._group.slots:
                living.add(place.bundle)
        nodes = self._group.nodes(plan)
        present = {index for index, node_id in nodes.items() if node_id in alive}
        return elasticity.whole_islands(plan, present, living)

    def _shrunk_dp(self, waited_s: float) -> int | None:
        """Returns a size at which the job can go on at once; None: it waits."""
        if not self._is_elastic or self._job.entry.phase is not Phase.RECOVERING:
            return None
        plan = self.full_plan()
        shortage = Shortage(
            bundle_size=plan.bundle_size,
            ranks=len(self._available(plan)) * plan.bundle_size,
            has_room=plan.is_feasible,
            waited_s=waited_s,
        )
        return elasticity.shrunk_dp(self._job.spec, shortage)

    def _record_size(self) -> None:
        """Records that the next attempt has another size than the last one."""
        job = self._job
        full = job.spec.parallel.dp
        dp = self._dp
        if dp is not None and dp != job.entry.dp:
            message = f"goes on with dp={dp} instead of {full}, without the lost nodes"
            data = {"dp": dp, "full_dp": full}
            job.records.event(EventType.JOB_SHRUNK, message, "warn", data)
        elif dp is None and job.entry.dp is not None:
            message = f"back from dp={job.entry.dp} to dp={full}"
            job.records.event(EventType.JOB_GROWN, message, data={"dp": full})

    # ---- what is looked at

    def _look_again(self, *, is_first: bool) -> None:
        """Explains the wait, and ends it if the request keeps from nodes in vain."""
        requested = self.full_plan()
        latest = self._plan_again()
        self._explain(latest, is_first=is_first)
        if requested.keeps_from(latest.allowed_nodes):
            self._request_anew("nodes may be used now that it leaves out")

    def _choose_copies(self) -> Placed | None:
        """Chooses copies in the ranks' memory, with the checkpoint that they stand for.

        None where there are none as new as the checkpoint. Storage is not read.
        """
        job = self._job
        entry = job.entry
        path = None
        for kept, step in job.records.kept_checkpoints.items():
            is_behind = is_left_behind(entry.rollbacks, attempt_of(kept), step)
            is_usable = kept not in entry.damaged and not is_behind
            if step == entry.last_commit and is_usable:
                path = kept
        # Without it, copies that turn out to be unusable would cost all progress.
        if entry.last_commit > 0 and path is None:
            return None
        copies = self._copies.find(self._dp)
        if copies is None:
            return None
        return Placed(job.ports.code_version, path, entry.last_commit, copies, self._dp)

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
            return Placed(job.ports.code_version, None, dp=self._dp)
        return Placed(job.ports.code_version, newest.path, newest.step, dp=self._dp)

    def _find_damage(self, info: CheckpointInfo) -> str | None:
        """Returns what ranks of earlier attempts have read; the driver reads no tensors."""
        return info.damage or self._job.entry.damaged.get(info.path)

    def _plan_again(self) -> PlacementPlan:
        """Returns a plan for the bundles that are requested already."""
        tp = self._job.spec.parallel.tp
        return self._make_plan(self._job.entry.bundle_size or tp)

    def _make_plan(self, size: int | None) -> PlacementPlan:
        job = self._job
        nodes = job.ports.read_nodes()
        # Ray still lists nodes as alive that have just been lost.
        if self._is_elastic:
            nodes = tuple(
                node for node in nodes if node.node_id not in job.entry.lost_nodes
            )
        if job.desired is not None:
            # A pending placement group makes Ray's autoscaler start them.
            nodes = (*nodes, *nodes_to_come(nodes, job.desired.node_groups))
        return plan_placement(
            job.spec,
            nodes,
            job.entry.accelerator,
            size=size,
            avoid=job.avoided_nodes,
        )

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
