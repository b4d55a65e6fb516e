"""Attempt after attempt until the job ends.

Owns: starting ranks, taking over living ones, what follows a failure.

Every decision is made by `policies` and told as an event; every step is in the journal
before it is taken, so that a driver that dies anywhere in here goes on where it was.
Must not know: HTTP, torch, data, the queue.
"""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_ray.checkpoint.directory import latest_committed, list_checkpoints
from workers.decisions import recovery, restart_policy
from workers.decisions.failures import Failure, FailureKind
from workers.decisions.placement import PlacementPlan, assign_ranks
from workers.decisions.recovery import RecoveryWatch
from workers.decisions.restart_policy import RestartHistory
from workers.decisions.slot_assignment import SlotAssignment, assign_slots
from workers.driver.commit import WholeCheckpoint
from workers.driver.context import JobContext
from workers.driver.dead_rank_files import DeadRankFiles
from workers.driver.exceptions import BackToQueue, JobEnds
from workers.driver.gauges import TrainingGauges
from workers.driver.journal import (
    DeadRank,
    FailedAttempt,
    JournalEntry,
    Phase,
    start_orders,
)
from workers.driver.logs import JobLogs
from workers.driver.spares import SparePool
from workers.driver.supervision import AttemptEnd, AttemptPlan, EndKind, Supervision
from workers.protocol.states import AttemptState, DesiredState, JobState, StatusReason
from workers.protocol.version import code_version
from workers.ray.worker_group import WorkerGroup, WorkerGroupError

_START_TIMEOUT_S = 180.0
_LEAVE_TIMEOUT_S = 6.0
_LOOK_UP_S = 2.0


class Attempts:
    """One incarnation's attempts.

    `place` waits for the placement group and returns its plan.
    """

    def __init__(
        self,
        job: JobContext,
        group: WorkerGroup,
        logs: JobLogs,
        leftovers: DeadRankFiles,
        place: Callable[[], PlacementPlan],
    ) -> None:
        self._job = job
        self._group = group
        self._logs = logs
        self._leftovers = leftovers
        self._place = place
        self._gauges = TrainingGauges(job.job_id)
        self._random = random.Random()
        self._reached = 0
        self._watch: RecoveryWatch | None = None
        self._standbys: SparePool | None = None

    def run(self, plan: PlacementPlan, found: JournalEntry | None) -> None:
        """From the journal entry of an earlier incarnation, or anew.

        Raises JobEnds, BackToQueue, DriverReplacedError.
        """
        end = self._take_over(found, plan) if found is not None else None
        while True:
            if end is not None:
                self._follow(end)
                plan = self._place()  # Ray may be moving bundles away from a lost node
            end = self._new_attempt(plan)

    # ---- what an earlier incarnation has left

    def _take_over(self, found: JournalEntry, plan: PlacementPlan) -> AttemptEnd | None:
        """The end of the attempt that was under way; None when there is none to speak
        of.
        """
        if found.phase not in (Phase.STARTING, Phase.RUNNING, Phase.RECOVERING):
            return None
        missing = self._group.adopt(range(self._job.num_slots))
        self._tell_checkpoints()
        if found.phase is Phase.RECOVERING:
            return self._unfinished_recovery(found)
        if found.phase is Phase.STARTING or not found.ranks:
            text = "the driver ended while the ranks were starting; they are started again"
            self._job.say.event("attempt.abandoned", text, "warn")
            self._free_ranks()
            self._job.say.attempt(
                AttemptState.STOPPED, self._job.world_size, None, "abandoned while starting"
            )
            return None
        self._leftovers.collect(
            found.dead
        )  # the earlier incarnation may not have come to the end of it
        dead = [place for place in found.ranks if place.slot in missing]
        if dead:
            text = (
                f"its process was gone when the driver came back (pid {dead[0].pid} on node "
                f"{dead[0].address})"
            )
            cause = Failure(FailureKind.PROCESS_DIED, text, dead[0].rank)
            return AttemptEnd(EndKind.FAILED, cause, tuple(place.rank for place in dead))
        pids = [place.pid for place in found.ranks]
        self._job.say.event(
            "driver.adopted", f"{len(pids)} running ranks adopted", data={"pids": pids}
        )
        return self._supervise(plan, renew=found.code_version != code_version())

    def _unfinished_recovery(self, found: JournalEntry) -> AttemptEnd | None:
        if found.failed is None:  # already decided: on with the next attempt
            self._free_ranks()
            return None
        failed = found.failed
        cause = Failure(failed.kind, failed.message, failed.rank, detail=failed.detail)
        return AttemptEnd(EndKind.FAILED, cause, failed.dead_ranks)

    def _tell_checkpoints(self) -> None:
        """Commits and deletions that the earlier incarnation made and did not live to
        tell.
        """
        there = {
            info.path: info
            for info in list_checkpoints(self._job.job_dir)
            if info.committed
        }
        for path in self._job.say.kept_checkpoints.keys() - there.keys():
            self._job.say.deleted(path)
        for info in sorted(there.values(), key=lambda info: info.order):
            self._record_commit(info.step, info.path, info.bytes, info.loss)

    # ---- after an attempt

    def _follow(self, end: AttemptEnd) -> None:
        """What comes after an attempt: nothing (go on with another), or a way out by
        JobEnds or BackToQueue.
        """
        job = self._job
        if end.kind is EndKind.FINISHED:
            job.say.attempt(AttemptState.SUCCEEDED, job.world_size)
            raise JobEnds(JobState.SUCCEEDED)
        if end.kind is EndKind.STOPPED and job.wish is DesiredState.RUN:
            renewed = job.entry.code_version != code_version()
            why = "for a new version of the code" if renewed else "and is wanted again"
            job.say.attempt(
                AttemptState.STOPPED, job.world_size, None, f"stopped at a checkpoint {why}"
            )
            self._group.kill_slots(self._group.slots)
            job.say.state(JobState.RECOVERING, None, f"stopped at a checkpoint {why}")
            return
        if end.kind is EndKind.FAILED:
            self._fail_attempt(end)
        if job.wish in (DesiredState.CANCEL, DesiredState.PAUSE):
            text = (
                f"stopped after the grace period of {job.spec.grace_s:g} s, without a last "
                "checkpoint"
                if end.forced
                else ""
            )
            job.say.attempt(AttemptState.STOPPED, job.world_size, None, text)
            if job.wish is DesiredState.CANCEL:
                raise JobEnds(JobState.CANCELLED, StatusReason.USER_CANCELLED, text)
            raise BackToQueue(JobState.PAUSED, None, text, job.revision)
        assert end.cause is not None
        self._decide(end.cause)

    def _fail_attempt(self, end: AttemptEnd) -> None:
        """Survivors leave at once; processes that can be used again are kept."""
        job = self._job
        cause = end.cause
        assert cause is not None
        self._watch = RecoveryWatch(time.monotonic(), self._reached)
        failed = FailedAttempt(
            kind=cause.kind,
            message=cause.message,
            rank=cause.rank,
            detail=cause.detail[-4000:],
            dead_ranks=end.dead_ranks,
        )
        # Of an attempt that never ran nobody has fetched anything yet; of one that did,
        # its start began to.
        dead = (
            {}
            if job.entry.phase is Phase.RUNNING
            else {(rank.attempt, rank.place.rank): rank for rank in job.entry.dead}
        )
        for place in job.entry.ranks:
            if place.rank in end.dead_ranks:
                dead[job.entry.attempt, place.rank] = DeadRank(
                    attempt=job.entry.attempt, place=place
                )
        job.write(phase=Phase.RECOVERING, failed=failed, dead=tuple(dead.values()))
        free = self._free_ranks()
        detail = (
            {"traceback": cause.detail}
            if cause.detail and cause.kind is not FailureKind.USER
            else {}
        )
        ranks = [] if cause.rank is None else [cause.rank]
        data = {"kind": cause.kind.value, "kept_slots": list(free), **detail}
        if job.say.attempt_state(job.entry.attempt) is not AttemptState.FAILED:
            job.say.event("attempt.failed", cause.sentence(), "error", data, ranks)
        job.say.attempt(AttemptState.FAILED, job.world_size, cause.reason, cause.sentence())

    def _free_ranks(self) -> tuple[int, ...]:
        """All living ranks leave their groups; those that cannot are ended.

        Returns the slots that may be used again.
        """
        free = self._group.leave(self._job.fence, _LEAVE_TIMEOUT_S)
        self._group.kill_slots([slot for slot in self._group.slots if slot not in free])
        return free

    def _decide(self, cause: Failure) -> None:
        """Raises JobEnds when this was one failure too many."""
        job = self._job
        entry = self._job.entry
        history = RestartHistory(
            entry.failures, entry.preemptions, entry.commits_at_failure
        )
        decision = restart_policy.decide_restart(
            job.spec.restart, history, cause, entry.last_commit, self._random.random()
        )
        spent = decision.history
        data = {
            "retry": decision.retry,
            "delay_s": round(decision.delay_s, 3),
            "reason": decision.reason.value,
            "failures": spent.failures,
        }
        data["preemptions"] = spent.preemptions
        words = (
            f"trying again from step {entry.last_commit}" if decision.retry else "giving up"
        )
        job.say.event(
            "policy.decision",
            f"{words}: {decision.message}",
            "warn" if decision.retry else "error",
            data,
        )
        if decision.retry:
            job.say.state(JobState.RECOVERING, decision.reason, decision.message)
        job.write(
            failures=spent.failures,
            preemptions=spent.preemptions,
            commits_at_failure=spent.commits_at_failure,
            failed=None,
        )
        if not decision.retry:
            raise JobEnds(JobState.FAILED, decision.reason, decision.message)
        until = time.monotonic() + decision.delay_s
        while (left := until - time.monotonic()) > 0:
            job.stop_if_unwanted()
            job.outbox.wait(min(0.2, left))

    # ---- one attempt

    def _new_attempt(self, plan: PlacementPlan) -> AttemptEnd:
        """Starts ranks and stays with them; a start that fails is an attempt that
        failed.
        """
        job = self._job
        newest = latest_committed(job.job_dir)
        if job.entry.code_version != code_version():
            self._group.kill_slots(
                self._group.slots
                # another version's processes: they may lack what this driver asks of them
            )
        job.write(
            attempt=job.entry.attempt + 1,
            phase=Phase.STARTING,
            code_version=code_version(),
            resumed_from=newest.path if newest else None,
            last_commit=newest.step if newest else 0,
            stopping=None,
            failed=None,
        )
        if self._watch is not None:
            self._watch.from_step = job.entry.last_commit
        if job.say.last_state is not JobState.RECOVERING:
            job.say.state(JobState.STARTING)
        job.say.attempt(
            AttemptState.STARTING,
            job.world_size,
            None,
            f"from step {job.entry.last_commit}",
        )
        try:
            self._start_ranks(plan)
        except (JobEnds, BackToQueue):
            job.say.attempt(AttemptState.STOPPED, job.world_size)
            raise
        except WorkerGroupError as problem:
            cause = Failure(problem.kind, f"the ranks did not start: {problem}")
            self._group.kill_slots(problem.dead_slots)
            return AttemptEnd(EndKind.FAILED, cause)
        return self._supervise(plan)

    def _start_ranks(self, plan: PlacementPlan) -> None:
        """Workers, places, store, orders; each in the journal before the next.

        Raises WorkerGroupError.
        """
        job = self._job
        marks = [time.monotonic()]
        staff = self._staff(plan)
        self._group.kill_slots(staff.released)
        self._group.create(plan, staff.workers_to_start, job.spec.resources.num_threads)
        facts = self._group.probe(
            staff.slots, job.fence, _START_TIMEOUT_S, job.stop_if_unwanted
        )
        marks.append(time.monotonic())
        places = assign_ranks(staff.apply(facts), plan.dims)
        store = None
        if (
            job.world_size > 1
            # rank 0 serves it: an attempt ends with any of its ranks, and the next one
            # opens another
        ):
            store = self._group.open_store(
                places[0].slot, job.fence, _START_TIMEOUT_S, job.stop_if_unwanted
            )
        marks.append(time.monotonic())
        job.write(ranks=places, store=store)
        job.say.ranks(places)
        self._group.start(
            job.fence,
            start_orders(job.entry, plan.accelerator),
            _START_TIMEOUT_S,
            job.stop_if_unwanted,
        )
        job.write(phase=Phase.RUNNING)
        marks.append(time.monotonic())
        data: dict[str, Any] = {
            name: round(marks[index + 1] - marks[index], 3)
            for index, name in enumerate(("probe", "store", "start"))
        }
        self._leftovers.collect(job.entry.dead)
        promoted = [place for place in places if place.slot in staff.promoted]
        data["promoted"] = [place.rank for place in promoted]
        also = "".join(
            f"; rank {place.rank} in a process that stood by (pid {place.pid})"
            for place in promoted
        )
        job.say.event("ranks.started", f"{len(places)} ranks started{also}", data=data)

    def _staff(self, plan: PlacementPlan) -> SlotAssignment:
        """Who serves next, of those that live and that must be made."""
        in_map = {place.slot for place in self._job.entry.ranks}
        others = [slot for slot in self._group.slots if slot not in in_map]
        found, _ = self._group.look_up(others, self._job.fence, _LOOK_UP_S)
        return assign_slots(
            plan, self._job.entry.ranks, self._group.slots, found, self._group.nodes(plan)
        )

    def _supervise(self, placement: PlacementPlan, renew: bool = False) -> AttemptEnd:
        job = self._job
        self._standbys = SparePool(job, self._group, placement)
        entry = job.entry
        spec = job.spec
        plan = AttemptPlan(
            attempt=entry.attempt,
            epoch=entry.epoch,
            places=entry.ranks,
            storage_path=job.job_dir,
            keep_last=spec.checkpoint.keep_last,
            grace_s=spec.grace_s,
            manifest={
                "world_size": len(entry.ranks),
                "spec": entry.spec,
                "code_version": entry.code_version,
            },
            last_commit=entry.last_commit,
            checkpoint_requests=entry.checkpoint_requests,
            stopping=entry.stopping,
            renew=renew,
        )
        return Supervision(plan, self._group, job.outbox, self._logs, self).run()

    # ---- what the supervision tells

    def stepped(self, data: dict[str, Any]) -> None:
        """A step of rank 0."""
        self._gauges.show(data)
        self._running()
        if self._standbys is not None:
            self._standbys.maintain()
        self._reached = max(self._reached, data["step"])
        split = (
            self._watch.step(data["step"], time.monotonic())
            if self._watch is not None
            else None
        )
        if split is not None:
            self._watch = None
            self._job.say.event(
                "job.recovered",
                recovery.in_words(split, self._job.entry.attempt),
                data=split,
            )

    def phase(self, data: dict[str, Any]) -> None:
        """A phase of rank 0's start."""
        if self._watch is not None:
            self._watch.phase(data)

    def committed(self, whole: WholeCheckpoint, deleted: Sequence[str]) -> None:
        """A checkpoint counts, and others are gone."""
        self._record_commit(whole.step, whole.path, whole.bytes_written, whole.loss)
        for path in deleted:
            self._job.say.deleted(path)

    def commanded(
        self,
        *,
        stopping: DesiredState | None = None,
        checkpoint_requests: int | None = None,
    ) -> None:
        """The ranks were told to stop, or to write a checkpoint: not to be told again
        by the next incarnation.
        """
        if stopping is not None:
            self._job.write(stopping=stopping)
        if checkpoint_requests is not None:
            self._job.write(checkpoint_requests=checkpoint_requests)

    def _running(self) -> None:
        """The attempt's first step makes the job a running one."""
        say = self._job.say
        if say.attempt_state(self._job.entry.attempt) is AttemptState.RUNNING:
            return
        if self._job.wish is DesiredState.RUN:
            say.state(JobState.RUNNING)
        say.attempt(AttemptState.RUNNING, self._job.world_size)

    def _record_commit(self, step: int, path: str, size: int, loss: float | None) -> None:
        self._job.say.committed(step, path, size, loss)
        if step > self._job.entry.last_commit:
            self._job.write(last_commit=step)
