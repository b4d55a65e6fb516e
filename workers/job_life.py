"""A job from its first data task to its last actor. Owns: the order of phases, the journal, the restart loop, the records.

Runs in the driver's own thread. Every step is written to the journal before it is taken, and every creation is get-or-create,
so a restarted driver enters at the phase that it finds. Must not know: HTTP, torch, actor plumbing.
"""

import random
import time
from collections.abc import Sequence
from typing import Any

from megatron_ray.checkpoint.directory import latest_committed
from megatron_ray.data.prepared import PreparedData
from workers import policies, tasks
from workers.cluster import read_nodes
from workers.commit import WholeCheckpoint
from workers.data_tasks import prepare_task
from workers.gauges import TrainingGauges
from workers.group import GroupProblem, WorkerGroup
from workers.job import JobSpec
from workers.job_records import JobRecords
from workers.joblogs import JobLogs
from workers.journal import Ending, Journal, JournalEntry, Phase, start_orders
from workers.leftovers import Leftovers
from workers.orders import Fence
from workers.outbox import Outbox, RecordBook
from workers.placement import PlacementPlan, assign_ranks, plan_placement
from workers.policies import Failure, FailureKind, RestartHistory
from workers.states import AttemptState, DesiredState, JobState, StatusReason
from workers.supervision import AttemptEnd, AttemptPlan, EndKind, Supervision
from workers.tasks import TaskFailed
from workers.version import code_version
from workers.ways_out import BackToQueue, DriverReplaced, JobEnds
from workers.wire import DesiredJob

_START_TIMEOUT_S = 180.0
_LEAVE_TIMEOUT_S = 6.0
_EXPLAIN_EVERY_S = 15.0


class JobLife:
    """One incarnation's work on one job. `worker_class` is what runs the ranks; `trouble` is what ended the incarnation before."""

    def __init__(self, job_id: str, job_dir: str, namespace: str, worker_class: type, trouble: str = "") -> None:
        self.job_id, self._job_dir = job_id, job_dir
        self._journal = Journal(job_dir)
        found = self._journal.latest()
        self._found, self._trouble = found, trouble
        self._entry = found or JournalEntry(job_id=job_id, epoch=0)
        self._entry = self._entry.model_copy(update={"epoch": self._entry.epoch + 1})
        self._journal.write(self._entry)
        self.outbox = Outbox(job_id, RecordBook(job_dir), self._entry.epoch)
        self._group = WorkerGroup(job_id, namespace, worker_class)
        self._logs = JobLogs(job_dir)
        self._gauges = TrainingGauges(job_id)
        self._random = random.Random()
        self._leftovers = Leftovers(self.outbox, self._logs)
        self._say = JobRecords(self.outbox, lambda: self._entry.attempt)
        self._revision_used = -1

    @property
    def phase(self) -> str:
        """Where the job is, for the agent's report."""
        return f"attempt {self._entry.attempt}, {self._entry.phase.value}"

    def run(self, give_up: bool = False) -> None:
        """To the end of the job (at once, as failed, with `give_up`); returns when the service has stored the last record.

        Raises DriverReplaced.
        """
        if self._found is not None:
            why = f" after: {self._trouble}" if self._trouble else ""
            text = f"driver incarnation {self._entry.epoch} took over in phase {self._found.phase.value}{why}"
            self._say.event("driver.restarted", text, "warn")
        ending = self._entry.ending
        if ending is None and give_up:
            text = f"the job's driver cannot go on: {self._trouble}"
            ending = Ending(state=JobState.FAILED.value, reason=StatusReason.INTERNAL.value, message=text)
        if ending is None:
            try:
                self._through_phases()
            except JobEnds as ends:
                ending = ends.ending
        assert ending is not None
        self._end(ending)

    # ---- phases

    def _through_phases(self) -> None:
        """Raises JobEnds."""
        self._await_spec()
        self._prepare()
        fresh = self._found is None or self._found.phase in (Phase.PREPARING, Phase.READY)
        while True:
            if fresh:
                self._await_run()
            try:
                plan = self._place(fresh)
                self._attempts(plan)
            except BackToQueue as back:
                self._give_back(back)
            fresh = True

    def _give_back(self, back: BackToQueue) -> None:
        self._revision_used, self._found = back.revision, None
        self._group.remove_all(self._world_size)
        self._write(phase=Phase.READY)
        self._say.state(back.state, back.reason, str(back))

    def _await_spec(self) -> None:
        """A new job's spec comes with the first attach; an old one's is in the journal."""
        while self._entry.spec is None:
            self._check_replaced()
            if self._desired is not None:
                self._write(spec=self._desired.spec, code_version=code_version())
                return
            self.outbox.wait(1.0)

    def _prepare(self) -> None:
        if self._entry.prepared is not None:
            return
        self._say.state(JobState.PREPARING, StatusReason.PREPARING_DATA, "the data are being prepared")
        call = tasks.anywhere(prepare_task, self._entry.spec)
        while not tasks.is_done(call):
            self._stop_if_cancelled()
            self.outbox.wait(0.1)
        try:
            found = tasks.result(call)
        except TaskFailed as failure:
            raise JobEnds(JobState.FAILED, StatusReason.INTERNAL, f"preparing the data failed: {failure}") from failure
        if "problems" in found:
            self._say.problems(found["problems"])
            first = found["problems"][0]
            raise JobEnds(JobState.FAILED, StatusReason.SPEC_INVALID, f"{first['pointer']}: {first['detail']}", told=True)
        data = PreparedData.model_validate(found["prepared"])
        self._write(prepared=found["prepared"], phase=Phase.READY)
        tokens = sum(corpus.num_tokens for corpus in data.train)
        self._say.prepared(found["prepared"], tokens, data.unigram_nats)

    def _await_run(self) -> None:
        while True:
            self._stop_if_cancelled()
            desired = self._desired
            if desired is not None and desired.desired is DesiredState.RUN and desired.revision > self._revision_used:
                return
            self.outbox.wait(1.0)

    def _place(self, fresh: bool) -> PlacementPlan:
        """The placement group, ready. Raises BackToQueue at the deadline, JobEnds when cancelled."""
        if fresh:
            self._write(phase=Phase.SCHEDULING)
            self._say.state(JobState.SCHEDULING)
        plan = plan_placement(self._spec, read_nodes(), self._entry.accelerator)
        self._write(accelerator=plan.accelerator)
        placed = self._group.placement_group(plan)
        started, explain_at = time.monotonic(), time.monotonic() + 2.0
        limit = self._spec.resources.placement_timeout_s
        while not placed.wait(0.2):
            self._stop_if_cancelled()
            now = time.monotonic()
            if now > explain_at:
                explain_at = now + _EXPLAIN_EVERY_S
                plan = plan_placement(self._spec, read_nodes(), self._entry.accelerator)
                if now - started < _EXPLAIN_EVERY_S or not plan.feasible:
                    self._say.event("placement.waiting", plan.explanation, "info" if plan.feasible else "warn")
            if now - started > limit:
                text = f"no room within {limit:g} s: {plan.explanation}"
                raise BackToQueue(JobState.QUEUED, StatusReason.WAITING_GANG, text, self._revision)
        return plan

    def _attempts(self, plan: PlacementPlan) -> None:
        """Attempt after attempt. Raises JobEnds, BackToQueue."""
        entry = self._found
        self._found = None
        end: AttemptEnd | None = None
        if entry is not None and entry.phase in (Phase.STARTING, Phase.RUNNING):
            end = self._adopt(entry)
        while True:
            if end is not None:
                self._follow(end)
                plan = self._place(False)  # Ray may be moving bundles away from a lost node
            end = self._new_attempt(plan)

    def _follow(self, end: AttemptEnd) -> None:
        """What comes after an attempt: nothing (go on with another), or a way out by JobEnds or BackToQueue."""
        wish = self._desired.desired if self._desired else DesiredState.RUN
        if end.kind is EndKind.FINISHED:
            self._say.attempt(AttemptState.SUCCEEDED, self._world_size)
            raise JobEnds(JobState.SUCCEEDED)
        if end.kind is EndKind.STOPPED and wish is DesiredState.RUN:
            self._say.attempt(AttemptState.STOPPED, self._world_size, None, "stopped at a checkpoint for a new version of the code")
            self._group.kill_slots(self._group.slots)
            self._say.state(JobState.RECOVERING, None, "starting again with a new version of the code")
            return
        if end.kind is EndKind.FAILED:
            self._fail_attempt(end)
        if wish in (DesiredState.CANCEL, DesiredState.PAUSE):
            text = f"stopped after the grace period of {self._spec.grace_s:g} s, without a last checkpoint" if end.forced else ""
            if end.kind is EndKind.STOPPED:
                self._say.attempt(AttemptState.STOPPED, self._world_size, None, text)
            if wish is DesiredState.CANCEL:
                raise JobEnds(JobState.CANCELLED, StatusReason.USER_CANCELLED, text)
            raise BackToQueue(JobState.PAUSED, None, text, self._revision)
        assert end.cause is not None
        self._decide(end.cause)

    def _fail_attempt(self, end: AttemptEnd) -> None:
        """Survivors leave at once; processes that can be used again are kept."""
        cause = end.cause
        assert cause is not None
        self._write(phase=Phase.RECOVERING)
        free = self._group.leave(self._fence, _LEAVE_TIMEOUT_S)
        self._leftovers.salvage(self._entry.attempt, [place for place in self._entry.ranks if place.rank in end.dead_ranks])
        self._group.kill_slots([slot for slot in self._group.slots if slot not in free])
        detail = {"traceback": cause.detail} if cause.detail and cause.kind is not FailureKind.USER else {}
        ranks = [] if cause.rank is None else [cause.rank]
        data = {"kind": cause.kind.value, "kept_slots": list(free), **detail}
        self._say.event("attempt.failed", cause.sentence(), "error", data, ranks)
        self._say.attempt(AttemptState.FAILED, self._world_size, cause.reason, cause.sentence())

    def _decide(self, cause: Failure) -> None:
        entry = self._entry
        history = RestartHistory(entry.failures, entry.preemptions, entry.commits_at_failure)
        decision = policies.decide_restart(self._spec.restart, history, cause, entry.last_commit, self._random.random())
        spent = decision.history
        self._write(failures=spent.failures, preemptions=spent.preemptions, commits_at_failure=spent.commits_at_failure)
        data = {"retry": decision.retry, "delay_s": round(decision.delay_s, 3), "reason": decision.reason.value, "failures": spent.failures}
        words = f"trying again from step {entry.last_commit}" if decision.retry else "giving up"
        self._say.event("policy.decision", f"{words}: {decision.message}", "warn" if decision.retry else "error", data)
        if not decision.retry:
            raise JobEnds(JobState.FAILED, decision.reason, decision.message)
        self._say.state(JobState.RECOVERING, decision.reason, decision.message)
        until = time.monotonic() + decision.delay_s
        while time.monotonic() < until:
            self._stop_if_cancelled()
            self.outbox.wait(min(0.2, max(0.0, until - time.monotonic())))

    # ---- one attempt

    def _new_attempt(self, plan: PlacementPlan) -> AttemptEnd:
        """Starts ranks and stays with them; a start that fails is an attempt that failed."""
        newest = latest_committed(self._job_dir)
        number = self._entry.attempt + 1
        self._write(
            attempt=number,
            phase=Phase.STARTING,
            code_version=code_version(),
            resumed_from=newest.path if newest else None,
            last_commit=newest.step if newest else 0,
            ranks=(),
        )
        if self._say.last_state is not JobState.RECOVERING:
            self._say.state(JobState.STARTING)
        self._say.attempt(AttemptState.STARTING, self._world_size, None, f"from step {self._entry.last_commit}")
        try:
            self._start_ranks(plan)
        except (JobEnds, BackToQueue):
            self._say.attempt(AttemptState.STOPPED, self._world_size)
            raise
        except GroupProblem as problem:
            cause = Failure(FailureKind.START, f"the ranks did not start: {problem}")
            self._group.kill_slots(problem.dead_slots)
            return AttemptEnd(EndKind.FAILED, cause)
        return self._supervise()

    def _start_ranks(self, plan: PlacementPlan) -> None:
        """Workers, store, places, orders; each in the journal before the next. Raises GroupProblem."""
        marks = [time.monotonic()]
        self._group.ensure_workers(plan, max(1, int(self._spec.resources.cpus_per_rank)))
        store = self._group.store_address(_START_TIMEOUT_S, self._stop_if_cancelled)
        marks.append(time.monotonic())
        facts = self._group.probe(self._fence, _START_TIMEOUT_S, self._stop_if_cancelled)
        marks.append(time.monotonic())
        places = assign_ranks(facts, plan.dims)
        self._write(ranks=places, store=store)
        self._say.ranks(places)
        self._group.start(self._fence, start_orders(self._entry, plan.accelerator), _START_TIMEOUT_S, self._stop_if_cancelled)
        self._write(phase=Phase.RUNNING)
        marks.append(time.monotonic())
        spans = {name: round(marks[index + 1] - marks[index], 3) for index, name in enumerate(("store", "probe", "start"))}
        self._say.event("attempt.started", f"{len(places)} ranks started", data=spans)

    def _adopt(self, entry: JournalEntry) -> AttemptEnd | None:
        """Takes over living ranks; None when the attempt had not come so far that this makes sense."""
        missing = self._group.adopt(range(self._world_size))
        if entry.phase is Phase.STARTING or not entry.ranks:
            self._say.event("attempt.abandoned", "the driver ended while the ranks were starting; they are started again", "warn")
            free = self._group.leave(self._fence, _LEAVE_TIMEOUT_S)
            self._group.kill_slots([slot for slot in self._group.slots if slot not in free])
            self._say.attempt(AttemptState.STOPPED, self._world_size, None, "abandoned while starting")
            return None
        dead = [place for place in entry.ranks if place.slot in missing]
        if dead:
            text = f"its process was gone when the driver came back (pid {dead[0].pid} on node {dead[0].address})"
            cause = Failure(FailureKind.PROCESS_DIED, text, dead[0].rank)
            return AttemptEnd(EndKind.FAILED, cause, tuple(place.rank for place in dead))
        newest = latest_committed(self._job_dir)
        if newest is not None and newest.step > entry.last_commit:
            self._record_commit(newest.step, newest.path, newest.bytes, newest.loss)
        self._say.event("driver.adopted", f"{len(entry.ranks)} running ranks adopted", data={"pids": [place.pid for place in entry.ranks]})
        return self._supervise(renew=entry.code_version != code_version())

    def _supervise(self, renew: bool = False) -> AttemptEnd:
        entry, spec = self._entry, self._spec
        plan = AttemptPlan(
            attempt=entry.attempt,
            epoch=entry.epoch,
            places=entry.ranks,
            storage_path=self._job_dir,
            keep_last=spec.checkpoint.keep_last,
            grace_s=spec.grace_s,
            manifest={"world_size": len(entry.ranks), "spec": entry.spec, "code_version": entry.code_version},
            last_commit=entry.last_commit,
            renew=renew,
        )
        return Supervision(plan, self._group, self.outbox, self._logs, self._gauges, self._committed, self._running).run()

    def _running(self) -> None:
        if self._desired is None or self._desired.desired is DesiredState.RUN:
            self._say.state(JobState.RUNNING)
        self._say.attempt(AttemptState.RUNNING, self._world_size)

    def _committed(self, whole: WholeCheckpoint, deleted: Sequence[str]) -> None:
        self._record_commit(whole.step, whole.path, whole.bytes_written, whole.loss)
        for path in deleted:
            self._say.deleted(path)

    def _record_commit(self, step: int, path: str, size: int, loss: float | None) -> None:
        self._write(last_commit=step)
        self._say.committed(step, path, size, loss)

    # ---- ends

    def _end(self, ending: Ending) -> None:
        """Leaves nothing behind, says the last word last, and waits until the service has heard it."""
        self._write(phase=Phase.ENDING, ending=ending)
        if self._entry.spec is not None:
            self._group.remove_all(self._world_size)
        self._leftovers.wait()
        self._logs.flush()
        self._leftovers.sweep(self._entry.ranks)
        self.outbox.flush()
        if not ending.told:
            reason = StatusReason(ending.reason) if ending.reason else None
            self._say.state(JobState(ending.state), reason, ending.message)
            self.outbox.flush()
        self._check_replaced()
        self.outbox.close()

    # ---- what is known

    @property
    def _spec(self) -> JobSpec:
        if self._entry.spec is None:
            raise ValueError("the job's spec is not known yet")
        return JobSpec.from_mapping(self._entry.spec)

    @property
    def _world_size(self) -> int:
        parallel = self._spec.parallel
        assert isinstance(parallel.dp, int)
        return parallel.tp * parallel.pp * parallel.cp * parallel.dp

    @property
    def _fence(self) -> Fence:
        return Fence(self._entry.attempt, self._entry.epoch)

    @property
    def _desired(self) -> DesiredJob | None:
        return self.outbox.desired

    @property
    def _revision(self) -> int:
        return self._desired.revision if self._desired else -1

    def _check_replaced(self) -> None:
        if self.outbox.replaced:
            raise DriverReplaced(self.outbox.replaced)

    def _stop_if_cancelled(self) -> None:
        """Raises JobEnds or BackToQueue when the job is no longer wanted to run; DriverReplaced when this driver is not."""
        self._check_replaced()
        wish = self._desired.desired if self._desired else None
        if wish is DesiredState.CANCEL:
            raise JobEnds(JobState.CANCELLED, StatusReason.USER_CANCELLED)
        if wish is DesiredState.PAUSE and self._entry.phase not in (Phase.PREPARING, Phase.READY):
            raise BackToQueue(JobState.PAUSED, None, "", self._revision)

    def _write(self, **changes: Any) -> None:
        """Journal first, then act."""
        self._entry = self._entry.model_copy(update=changes)
        self._journal.write(self._entry)
