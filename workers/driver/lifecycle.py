"""A job from its first data task to its last actor.

Owns: the order of phases, and what is left at the end (nothing).

Runs in the driver's own thread. Every phase is written to the journal before it is
begun, every creation is get-or-create, and nothing is said twice, so a restarted driver
enters at the phase that it finds. Must not know: HTTP, torch, actor plumbing.
"""

import time

from megatron_ray.data.prepared import PreparedData
from workers.data_tasks import prepare_task
from workers.decisions.placement import PlacementPlan, plan_placement
from workers.driver.attempts import Attempts
from workers.driver.context import JobContext
from workers.driver.dead_rank_files import DeadRankFiles
from workers.driver.exceptions import BackToQueue, JobEnds
from workers.driver.journal import Ending, Phase, ResourcesReleased
from workers.driver.logs import JobLogs
from workers.protocol.states import DesiredState, JobState, StatusReason
from workers.protocol.version import code_version
from workers.ray import tasks
from workers.ray.nodes import read_nodes
from workers.ray.tasks import TaskFailedError
from workers.ray.worker_group import WorkerGroup

_EXPLAIN_EVERY_S = 15.0
_RETIRE_S = 2.0
_SWEEP_S = 5.0
_LATE_SWEEP_S = 60.0
"""A node that is too busy to start a process for the clean-up holds nobody up: it may
come after the last word."""


class JobLifecycle:
    """One incarnation's work on one job.

    `worker_class` is what runs the ranks; `trouble` is what ended the incarnation
    before.

    Raises StorageError, JournalError, ForeignJournalError.
    """

    def __init__(
        self,
        job_id: str,
        job_dir: str,
        namespace: str,
        worker_class: type,
        trouble: str = "",
    ) -> None:
        self._job = JobContext(job_id, job_dir)
        self.outbox = self._job.outbox
        self._trouble = trouble
        self._group = WorkerGroup(job_id, namespace, worker_class)
        self._logs = JobLogs(job_dir)
        self._leftovers = DeadRankFiles(self.outbox, self._logs)

    @property
    def phase(self) -> str:
        """Where the job is, for the agent's report."""
        return f"attempt {self._job.entry.attempt}, {self._job.entry.phase.value}"

    def run(self, ending: Ending | None = None) -> None:
        """To the end of the job, at once when it is given; returns when the service has
        stored the last record.

        Raises DriverReplacedError.
        """
        job = self._job
        if job.found is not None:
            why = f" after: {self._trouble}" if self._trouble else ""
            text = (
                f"driver incarnation {job.entry.epoch} took over in phase "
                f"{job.found.phase.value}{why}"
            )
            job.say.event("driver.restarted", text, "warn")
        ending = job.entry.ending or ending
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
        attempts = Attempts(
            self._job, self._group, self._logs, self._leftovers, self._place
        )
        found = self._job.found
        if found is None or found.phase in (Phase.PREPARING, Phase.READY):
            found = None
            self._clear_up()
        while True:
            if found is None:
                self._await_run()
            try:
                plan = self._place() if found is not None else self._place_anew()
                attempts.run(plan, found)
            except BackToQueue as back:
                self._job.write(phase=Phase.READY, given_back=_given_back(back))
                self._clear_up()
            found = None

    def _clear_up(self) -> None:
        """Gives back what the journal says is not held any more."""
        back = self._job.entry.given_back
        if back is not None:
            self._group.remove_all(self._job.num_slots)
            reason = StatusReason(back.reason) if back.reason else None
            self._job.say.state(JobState(back.state), reason, back.message)

    def _await_spec(self) -> None:
        """A new job's spec comes with the first attach; an old one's is in the journal."""
        job = self._job
        while job.entry.spec is None:
            job.check_replaced()
            if job.desired is not None:
                job.write(spec=job.desired.spec, code_version=code_version())
                return
            job.outbox.wait(1.0)

    def _prepare(self) -> None:
        job = self._job
        if job.entry.prepared is None:
            job.say.state(
                JobState.PREPARING,
                StatusReason.PREPARING_DATA,
                "the data are being prepared",
            )
            job.write(prepared=self._prepared_data(), phase=Phase.READY)
        data = PreparedData.model_validate(job.entry.prepared)
        tokens = sum(corpus.num_tokens for corpus in data.train)
        job.say.prepared(data.model_dump(mode="json"), tokens, data.unigram_nats)

    def _prepared_data(self) -> dict[str, object]:
        """From a task on CPU, which ends when the job does. Raises JobEnds."""
        call = tasks.anywhere(prepare_task, self._job.entry.spec)
        try:
            while not tasks.is_done(call):
                self._job.stop_if_unwanted()
                self._job.outbox.wait(0.1)
            found = tasks.result(call)
        except TaskFailedError as failure:
            raise JobEnds(
                JobState.FAILED,
                StatusReason.INTERNAL,
                f"preparing the data failed: {failure}",
            ) from failure
        finally:
            tasks.end(call)
        if "problems" in found:
            self._job.say.problems(found["problems"])
            first = found["problems"][0]
            raise JobEnds(
                JobState.FAILED,
                StatusReason.SPEC_INVALID,
                f"{first['pointer']}: {first['detail']}",
                told=True,
            )
        return dict(found["prepared"])

    def _await_run(self) -> None:
        job = self._job
        used = job.entry.given_back.revision if job.entry.given_back else -1
        while True:
            job.stop_if_unwanted()
            desired = job.desired
            if (
                desired is not None
                and desired.desired is DesiredState.RUN
                and desired.revision > used
            ):
                return
            job.outbox.wait(1.0)

    def _place_anew(self) -> PlacementPlan:
        self._job.say.state(JobState.SCHEDULING)
        self._job.write(phase=Phase.SCHEDULING, given_back=None, ranks=())
        return self._place()

    def _place(self) -> PlacementPlan:
        """The placement group, ready.

        Raises BackToQueue at the deadline, JobEnds when cancelled.
        """
        job = self._job
        plan = plan_placement(job.spec, read_nodes(), job.entry.accelerator)
        if plan.accelerator != job.entry.accelerator:
            job.write(accelerator=plan.accelerator)
        placed = self._group.placement_group(plan)
        started = time.monotonic()
        explain_at = time.monotonic() + 2.0
        limit = job.spec.resources.placement_timeout_s
        while not placed.wait(0.2):
            job.stop_if_unwanted()
            now = time.monotonic()
            if now > explain_at:
                explain_at = now + _EXPLAIN_EVERY_S
                plan = plan_placement(job.spec, read_nodes(), job.entry.accelerator)
                if now - started < _EXPLAIN_EVERY_S or not plan.is_feasible:
                    job.say.event(
                        "placement.waiting",
                        plan.explanation,
                        "info" if plan.is_feasible else "warn",
                    )
            if now - started > limit:
                text = f"no room within {limit:g} s: {plan.explanation}"
                raise BackToQueue(
                    JobState.QUEUED, StatusReason.WAITING_GANG, text, job.revision
                )
        nodes = {*job.entry.nodes, *self._group.nodes(plan).values()}
        if len(nodes) > len(job.entry.nodes):
            job.write(nodes=tuple(sorted(nodes)))
        return plan

    # ---- ends

    def _end(self, ending: Ending) -> None:
        """Leaves nothing behind, says the last word last, and waits until the service
        has heard it.
        """
        job = self._job
        job.write(phase=Phase.ENDING, ending=ending)
        self._leftovers.finish(job.entry.dead)
        self._logs.flush()
        if job.entry.spec is not None:
            cleaned = self._group.retire(job.fence, job.num_slots, _RETIRE_S)
            self._group.remove_all(job.num_slots)
            self._leftovers.start_sweep(job.job_id, set(job.entry.nodes) - set(cleaned))
        self._leftovers.await_sweep(_SWEEP_S)
        job.outbox.flush()
        if not ending.told:
            job.say.state(
                JobState(ending.state),
                StatusReason(ending.reason) if ending.reason else None,
                ending.message,
            )
            job.outbox.flush()
        job.check_replaced()
        job.outbox.close()
        self._leftovers.await_sweep(_LATE_SWEEP_S)


def _given_back(back: BackToQueue) -> ResourcesReleased:
    return ResourcesReleased(
        state=back.state.value,
        reason=back.reason.value if back.reason else None,
        message=str(back),
        revision=back.revision,
    )
