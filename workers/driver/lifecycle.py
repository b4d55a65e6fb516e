"""Runs a job from data preparation to the removal of its last actor.

Owns: the loop that carries out the transitions of `job_phases`, and the clean-up at the
end. Must not know: HTTP, torch, how the work of a phase is done.

Runs in the driver's own thread. Every phase is journaled before it begins, every
creation is get-or-create, and nothing is recorded twice, so a restarted driver resumes
in the journaled phase.
"""

from workers.decisions.job_phases import Transition, next_phase
from workers.decisions.journal_entry import Ending, Phase
from workers.decisions.observations import (
    AttemptExited,
    AttemptFailed,
    AttemptFinished,
    AttemptStopped,
    Observation,
    RanksStarted,
    StopRequested,
)
from workers.decisions.preflight.judgement import Limits
from workers.driver.attempt.growth import Growth
from workers.driver.attempt.outcome import RanksStopped
from workers.driver.attempt.plan import AttemptPlan
from workers.driver.attempt.progress import JobProgress
from workers.driver.attempt.spares import SparePool
from workers.driver.attempt.start import RankStarter
from workers.driver.attempt.supervision import Supervision
from workers.driver.context import JobContext
from workers.driver.ports import JobPorts
from workers.driver.preparation import DataPreparation
from workers.driver.recovering import WITH_RANKS, Recovery
from workers.driver.scheduling import Scheduling
from workers.protocol.states import DesiredState, JobState, StatusReason

_ATTACH_S = 10.0
_RETIRE_S = 2.0
_SWEEP_S = 5.0
_LATE_SWEEP_S = 60.0
"""Seconds to wait, after the last record, for nodes that were too busy to start a
clean-up process."""


class JobLifecycle:
    """Runs one job within one incarnation of its driver.

    `last_error` is the error that ended the previous incarnation. Raises StorageError,
    JournalError, ForeignJournalError.
    """

    def __init__(
        self, job_id: str, job_dir: str, ports: JobPorts, last_error: str = ""
    ) -> None:
        self._job = JobContext(job_id, job_dir, ports)
        self._ports = ports
        self._last_error = last_error
        self._preparation = DataPreparation(self._job)
        self._scheduling = Scheduling(self._job)
        self._starter = RankStarter(self._job)
        self._progress = JobProgress(self._job)
        self._recovery = Recovery(self._job, self._starter, self._progress)
        # In memory only: after a restart of the driver no further back-off is needed.
        self._retry_at = 0.0

    @property
    def phase(self) -> str:
        """Phase of the job, for the agent's report."""
        return f"attempt {self._job.entry.attempt}, {self._job.entry.phase.value}"

    def run(self, ending: Ending | None = None) -> None:
        """Runs the job to its end, at once when `ending` is not None.

        Returns when the service has stored the last record. Raises DriverReplacedError,
        FencedError, StorageError.
        """
        job = self._job
        self._resume_ended()
        self._record_takeover()
        if ending is not None and job.entry.ending is None:
            job.commit(Transition(Phase.ENDING, {"ending": ending}))
        # What happened to the ranks meanwhile is the first observation.
        if job.previous_entry is not None and job.entry.phase in WITH_RANKS:
            observation = self._recovery.adopt()
            if observation is not None:
                self._carry_out(next_phase(job.entry, observation))
        # Observe, decide, act. The phase is always read from the journal entry.
        while job.entry.phase is not Phase.ENDING:
            self._take_turn()
        self._end()

    def _resume_ended(self) -> None:
        """Reopens a job that an earlier incarnation has ended and the user has resumed."""
        job = self._job
        if job.entry.phase is not Phase.ENDING:
            return
        # Asked before the clean-up, which would take seconds and record the end again. The
        # agent attaches every new driver at once.
        request = job.resume_requested(_ATTACH_S)
        if request is not None:
            job.commit(next_phase(job.entry, request))

    def _record_takeover(self) -> None:
        previous = self._job.previous_entry
        if previous is None or self._job.entry.resumes > previous.resumes:
            return
        message = (
            f"driver incarnation {self._job.entry.epoch} took over in phase "
            f"{previous.phase.value}"
        )
        if self._last_error:
            message = f"{message} after: {self._last_error}"
        self._job.records.event("driver.restarted", message, "warn")

    def _take_turn(self) -> None:
        observation = self._work()
        # The entry is read afterwards, because the work changes some of its fields.
        self._carry_out(next_phase(self._job.entry, observation))

    def _carry_out(self, transition: Transition) -> None:
        self._retry_at = self._ports.clock() + transition.delay_s
        self._job.commit(transition)

    # ---- the work of each phase, until something is observed

    def _work(self) -> Observation:
        match self._job.entry.phase:
            case Phase.PREPARING:
                return self._preparation.run()
            case Phase.READY:
                # Repeated on every entry into this phase, also after a restart.
                self._preparation.record_result()
                self._scheduling.release()
                self._progress.on_released()
                return self._scheduling.await_run()
            case Phase.SCHEDULING:
                self._job.records.state(JobState.SCHEDULING)
                return self._scheduling.place()
            case Phase.STARTING:
                return self._start()
            case Phase.RUNNING:
                return self._supervise()
            case _:
                return self._recover()

    def _start(self) -> RanksStarted | AttemptFailed | StopRequested:
        self._recovery.mark_ranks_started()
        self._progress.on_attempt_starting()
        return self._starter.start(self._scheduling.attempt_plan())

    def _supervise(
        self,
    ) -> AttemptFinished | AttemptExited | AttemptStopped | AttemptFailed:
        job = self._job
        # The replacements run, so fetching files can no longer delay their start.
        self._ports.dead_rank_files.collect(job.entry.dead)
        self._starter.record_start()
        self._recovery.mark_ranks_started()
        plan = self._scheduling.full_plan()
        self._progress.on_attempt_running(SparePool(job, plan), Growth(job, plan))
        end = Supervision(self._attempt_plan(), self._ports, self._progress).run()
        if not isinstance(end, RanksStopped):
            return end
        return AttemptStopped(job.desired_state, job.revision, self._describe_stop(end))

    def _recover(self) -> Observation:
        failed = self._job.entry.failed
        if failed is not None:
            return self._recovery.handle_failure(failed)
        stop = self._recovery.prepare_next(self._retry_at)
        if stop is not None:
            return stop
        return self._scheduling.place()

    def _attempt_plan(self) -> AttemptPlan:
        job = self._job
        entry = job.entry
        manifest = {
            "world_size": len(entry.ranks),
            "spec": entry.attempt_spec,
            "code_version": entry.code_version,
            **job.run.to_manifest(),
        }
        return AttemptPlan(
            attempt=entry.attempt,
            epoch=entry.epoch,
            places=entry.ranks,
            storage_path=job.job_dir,
            keep_last=job.spec.checkpoint.keep_last,
            grace_s=job.spec.grace_s,
            manifest=manifest,
            last_commit=entry.last_commit,
            checkpoint_requests=entry.checkpoint_requests,
            diagnosis_requests=entry.diagnosis_requests,
            slow_ranks=job.records.slow_ranks(entry.attempt),
            preflight=self._limits(),
            hang_timeout_s=job.spec.restart.hang_timeout_s,
            stopping=entry.stopping,
            renew=entry.code_version != self._ports.code_version,
        )

    def _limits(self) -> Limits | None:
        config = self._job.entry.preflight
        if config is None:
            return None
        precision = self._job.spec.training.precision
        return Limits(config.min_ratio, config.timeout_s, precision)

    def _describe_stop(self, end: RanksStopped) -> str:
        job = self._job
        if job.desired_state in (DesiredState.CANCEL, DesiredState.PAUSE):
            if end.forced:
                return (
                    f"stopped after the grace period of {job.spec.grace_s:g} s, without a "
                    "final checkpoint"
                )
            return ""
        if end.resize_reason is not None:
            return f"stopped at a checkpoint to resize {end.resize_reason}"
        if job.entry.code_version != self._ports.code_version:
            return "stopped at a checkpoint for a new version of the code"
        return "stopped at a checkpoint and is to run again"

    # ---- the end

    def _end(self) -> None:
        """Cleans up completely and records the final state last.

        After the final state the service stops tracking the job, so everything else
        must be stored before it.
        """
        job = self._job
        files = self._ports.dead_rank_files
        outbox = self._ports.outbox
        ending = job.entry.ending
        assert ending is not None
        files.finish(job.entry.dead)
        self._ports.logs.flush()
        # Workers remove their own files, because a task on a busy node takes seconds to
        # start. Tasks sweep only nodes without a living worker.
        if job.entry.spec is not None:
            group = self._ports.group
            cleaned = group.retire(job.fence, job.num_slots, _RETIRE_S)
            group.remove_all(job.num_slots)
            files.start_sweep(job.job_id, set(job.entry.nodes) - set(cleaned))
        files.await_sweep(_SWEEP_S)
        outbox.flush()
        if not ending.is_recorded:
            reason = None
            if ending.reason:
                reason = StatusReason(ending.reason)
            job.records.state(JobState(ending.state), reason, ending.message)
            outbox.flush()
        # `flush` also returns when this driver was replaced and must not end the job.
        job.check_replaced()
        outbox.close()
        files.await_sweep(_LATE_SWEEP_S)
