"""Recovers a job after a failed or stopped attempt, or after the driver's own death.

Owns: the phase RECOVERING, and adopting a running attempt after a restart. Must not
know: the policy, how ranks are started or supervised, HTTP, torch.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from megatron_ray.checkpoint.directory import list_checkpoints, record_rollback
from workers.decisions.failures import Failure, FailureKind
from workers.decisions.faults import exclusions
from workers.decisions.faults.rollbacks import RollbackPlan, plan_rollback
from workers.decisions.journal_entry import FailedAttempt, Phase, RecheckedStep
from workers.decisions.observations import (
    AttemptAbandoned,
    AttemptFailed,
    RestartDecided,
    StopRequested,
)
from workers.decisions.preflight.verdict import blame
from workers.decisions.restart_policy import (
    RestartDecision,
    RestartHistory,
    decide_restart,
)
from workers.driver.attempt.bad_nodes import avoid_nodes, leave_nodes
from workers.driver.attempt.progress import JobProgress
from workers.driver.attempt.start import RankStarter
from workers.driver.context import JobContext
from workers.protocol.events import EventType
from workers.protocol.states import AttemptState

_TURN_S = 0.2
WITH_RANKS = (Phase.STARTING, Phase.RUNNING, Phase.RECOVERING)
"""Phases in which rank processes may be alive."""


class Recovery:
    """Frees ranks, handles failures and adopts the ranks of an earlier incarnation."""

    def __init__(
        self, job: JobContext, starter: RankStarter, progress: JobProgress
    ) -> None:
        self._job = job
        self._starter = starter
        self._progress = progress
        self._has_freed_ranks = False

    # ---- after the driver's own death

    def adopt(self) -> AttemptAbandoned | AttemptFailed | None:
        """Adopts the ranks that an earlier incarnation left.

        Returns the observation that has ended the attempt meanwhile; None when the
        phase continues.
        """
        job = self._job
        # Found by name, which works however far the start had progressed.
        missing = job.ports.group.adopt(range(job.num_slots))
        self._record_checkpoints()
        if job.entry.phase is Phase.RUNNING:
            return self._adopt_running(missing)
        # Some ranks may already be training and others not. All are freed, and the next
        # attempt starts them together.
        if job.entry.phase is Phase.STARTING:
            message = (
                "the driver ended while the ranks were starting; they are started again"
            )
            job.records.event("attempt.abandoned", message, "warn")
            self._free_ranks()
            return AttemptAbandoned()
        return None

    def _adopt_running(self, missing: tuple[int, ...]) -> AttemptFailed | None:
        job = self._job
        # The earlier incarnation may not have finished fetching these files.
        job.ports.dead_rank_files.collect(job.entry.dead)
        dead = []
        pids = []
        for place in job.entry.ranks:
            pids.append(place.pid)
            if place.slot in missing:
                dead.append(place)
        if dead:
            message = (
                f"its process had died when the driver restarted (pid {dead[0].pid} on node "
                f"{dead[0].address})"
            )
            cause = Failure(FailureKind.PROCESS_DIED, message, dead[0].rank)
            return AttemptFailed(cause, tuple(place.rank for place in dead))
        job.records.event(
            "driver.adopted", f"{len(pids)} running ranks adopted", data={"pids": pids}
        )
        return None

    def _record_checkpoints(self) -> None:
        """Records commits and deletions that the earlier incarnation did not record."""
        committed = {}
        existing = set()
        for info in list_checkpoints(self._job.job_dir):
            # Commits before a rollback were recorded before it.
            if info.committed and not info.is_left_behind:
                committed[info.path] = info
            # Damaged ones are kept, so they are not recorded as deleted.
            if info.was_committed:
                existing.add(info.path)
        # Storage is the source of truth: a commit is durable before it is recorded.
        for path in self._job.records.kept_checkpoints.keys() - existing:
            self._job.records.deleted(path)
        for info in sorted(committed.values(), key=lambda info: info.order):
            self._progress.record_commit(info.step, info.path, info.bytes, info.loss)

    # ---- after an attempt

    def mark_ranks_started(self) -> None:
        """Marks the ranks as not freed yet."""
        self._has_freed_ranks = False

    def prepare_next(self, retry_at: float) -> StopRequested | None:
        """Frees the ranks if needed, and waits until the back-off is over."""
        if not self._has_freed_ranks:
            self._free_ranks()
        job = self._job
        while job.ports.clock() < retry_at:
            stop = job.stop_requested()
            if stop is not None:
                return stop
            remaining = retry_at - job.ports.clock()
            job.ports.outbox.wait(max(0.0, min(_TURN_S, remaining)))
        # Freed first, so that no rank is killed in the middle of a write.
        self._starter.end_other_versions()
        return None

    def handle_failure(self, failed: FailedAttempt) -> RestartDecided | StopRequested:
        """Frees the ranks, records the failure and applies the restart policy."""
        job = self._job
        # The recovery is measured from here, before any waiting.
        self._progress.on_attempt_failed()
        cause = Failure(
            failed.kind,
            failed.message,
            failed.rank,
            detail=failed.detail,
            step=failed.step,
            facts=failed.facts,
        )
        silent_ranks: tuple[int, ...] = ()
        if failed.kind is FailureKind.SILENT:
            silent_ranks = failed.dead_ranks
        kept_slots = self._free_ranks(silent_ranks)
        self._record_failure(cause, kept_slots)
        self._journal_lost_nodes(failed, kept_slots)
        self._exclude_nodes(cause, failed.dead_ranks)
        # The restart policy does not apply to a job that is being cancelled.
        stop = job.stop_requested()
        if stop is not None:
            return stop
        decision = self._decide(cause)
        rollback: RollbackPlan | None = None
        last_commit = job.entry.last_commit
        if cause.kind is FailureKind.ROLLBACK:
            rollback = self._roll_back(cause)
            last_commit = rollback.step
            if rollback.rollback is None:
                message = f"{decision.message}, but not {rollback.refusal}"
                decision = replace(decision, retry=False, message=message)
        origin = f"step {last_commit}"
        if job.keeps_copies:
            origin = f"the newest peer copies, else from step {last_commit}"
        if cause.kind is FailureKind.CHECKPOINT:
            origin = "an older checkpoint"
        self._record_decision(decision, origin)
        return RestartDecided(decision, rollback)

    def _roll_back(self, cause: Failure) -> RollbackPlan:
        """Decides about a rollback, and records it where every later start finds it."""
        job = self._job
        plan = plan_rollback(
            job.entry.attempt,
            cause.facts,
            cause.message,
            job.entry.rollbacks,
            list_checkpoints(job.job_dir),
            job.spec.training.max_rollbacks,
        )
        # Before the journal: repeated by a successor, it changes nothing.
        if plan.rollback is not None:
            record_rollback(job.job_dir, plan.rollback)
            data = {
                "step": plan.rollback.step,
                "left_out": list(plan.rollback.left_out),
                "max_step": plan.rollback.max_step,
            }
            job.records.event(EventType.JOB_ROLLED_BACK, cause.message, "warn", data)
        return plan

    def _journal_recheck(self, cause: Failure) -> None:
        """Notes where a step was computed that the next attempt computes again."""
        for place in self._job.entry.ranks:
            if place.rank == cause.facts["rank"]:
                recheck = RecheckedStep(
                    step=cause.facts["step"],
                    rank=place.rank,
                    node_id=place.node_id,
                    address=place.address,
                )
                self._job.write(recheck=recheck)

    def _exclude_nodes(self, cause: Failure, dead_ranks: Collection[int]) -> None:
        """Has the next attempt avoid the nodes that the failure speaks against."""
        job = self._job
        bad = exclusions.bad_nodes(cause, job.entry.ranks, dead_ranks)
        if job.spec.restart.exclude_slow:
            slow = job.records.slow_ranks(job.entry.attempt)
            bad += exclusions.slow_nodes(slow, job.entry.ranks)
        avoid_nodes(job, bad)
        if cause.kind is FailureKind.RECHECK:
            self._journal_recheck(cause)
        if cause.kind is FailureKind.PREFLIGHT:
            blamed = job.records.blamed_nodes(job.entry.attempt)
            leave_nodes(job, exclusions.measured_nodes(blamed))

    def _decide(self, cause: Failure) -> RestartDecision:
        job = self._job
        entry = job.entry
        history = RestartHistory(
            entry.failures,
            entry.preemptions,
            entry.commits_at_failure,
            entry.last_error,
        )
        # The attempt may have begun after the newest checkpoint, from copies.
        saved_step = max(entry.last_commit, entry.first_step)
        decision = decide_restart(
            job.spec.restart, history, cause, saved_step, job.ports.jitter()
        )
        # The nodes were measured, which is all that the job was to do.
        if cause.kind is FailureKind.PREFLIGHT and job.spec.preflight.mode == "only":
            message = blame(job.records.blamed_nodes(entry.attempt))
            decision = replace(decision, retry=False, message=message)
        return decision

    def _journal_lost_nodes(
        self, failed: FailedAttempt, kept_slots: Collection[int]
    ) -> None:
        """Adds the nodes that the failure took away; Ray notices most of them later."""
        job = self._job
        if job.spec.elastic is None:
            return
        # Not only those of ranks that are known to have died: a peer's error may come
        # before the death of its cause is noticed, and a process may outlive its node's
        # Ray for a moment.
        node_ids = {place.node_id for place in job.entry.ranks}
        kept = set()
        silent = set()
        for place in job.entry.ranks:
            if place.slot in kept_slots:
                kept.add(place.node_id)
            elif failed.kind is FailureKind.SILENT and place.rank in failed.dead_ranks:
                silent.add(place.node_id)
        # A frozen node still accepts connections.
        silent -= kept
        draining = node_ids.intersection(job.ports.drains.deadlines)
        unreachable = job.ports.unreachable_nodes(sorted(node_ids - silent))
        lost = tuple(sorted({*silent, *unreachable, *draining}))
        if lost != job.entry.lost_nodes:
            job.write(lost_nodes=lost)

    def _free_ranks(self, silent_ranks: tuple[int, ...] = ()) -> tuple[int, ...]:
        self._has_freed_ranks = True
        return self._starter.free_ranks(silent_ranks)

    def _record_failure(self, cause: Failure, kept_slots: tuple[int, ...]) -> None:
        job = self._job
        data: dict[str, Any] = {"kind": cause.kind.value, "kept_slots": list(kept_slots)}
        # A traceback of the project's code does not help users to correct their input.
        if cause.detail and cause.kind is not FailureKind.USER:
            data["traceback"] = cause.detail
        ranks = []
        if cause.rank is not None:
            ranks = [cause.rank]
        message = cause.sentence()
        if job.records.attempt_state(job.entry.attempt) is not AttemptState.FAILED:
            job.records.event("attempt.failed", message, "error", data, ranks)
        job.records.attempt(AttemptState.FAILED, job.world_size, cause.reason, message)

    def _record_decision(self, decision: RestartDecision, origin: str) -> None:
        message = f"not restarting: {decision.message}"
        level = "error"
        if decision.retry:
            message = f"restarting from {origin}: {decision.message}"
            level = "warn"
        data = {
            "retry": decision.retry,
            "delay_s": round(decision.delay_s, 3),
            "reason": decision.reason.value,
            "failures": decision.history.failures,
            "preemptions": decision.history.preemptions,
        }
        self._job.records.event("policy.decision", message, level, data)
