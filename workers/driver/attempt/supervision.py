"""Supervises one attempt while it runs: observes, decides, acts.

Owns: the order of these in each turn. It restarts nothing: it returns how the attempt
ended. Must not know: HTTP, torch, how workers are started.
"""

from collections.abc import Sequence

from megatron_ray.commands import Command
from megatron_ray.reports import CheckpointFailedReport, PhaseReport, RuleReport, StepReport
from workers.decisions.failures import FailureKind
from workers.decisions.faults import drains, failing_storage
from workers.decisions.faults.drains import Drain
from workers.decisions.observations import (
    AttemptExited,
    AttemptFailed,
    AttemptFinished,
)
from workers.driver.attempt.autopsy import Autopsy
from workers.driver.attempt.committer import (
    CheckpointCommitter,
    CommitDelayed,
    Committed,
)
from workers.driver.attempt.outcome import (
    RanksStopped,
    attempt_end,
    attempt_failure,
    decide_stop,
    is_over,
)
from workers.driver.attempt.plan import AttemptListener, AttemptPlan
from workers.driver.attempt.preflight import PreflightWatch
from workers.driver.attempt.rank_monitor import RankMonitor
from workers.driver.attempt.stragglers import StragglerMonitor
from workers.driver.ports import JobPorts
from workers.driver.profiles import ProfileRequests
from workers.driver.relay import to_record
from workers.protocol.wire import DesiredJob
from workers.rank.spool import Line

ROOT_CAUSE_S = 0.3
"""Seconds to wait for more failures after the first one: the root cause may follow
it."""
_TURN_S = 0.2
_SHORT_TURN_S = 0.05

AttemptEnd = AttemptFinished | AttemptExited | RanksStopped | AttemptFailed


class Supervision:
    """Runs one attempt to its end."""

    def __init__(
        self, plan: AttemptPlan, ports: JobPorts, listener: AttemptListener
    ) -> None:
        self._plan = plan
        self._ports = ports
        self._listener = listener
        self._monitor = RankMonitor(plan, ports, self._stored)
        self._committer = CheckpointCommitter(plan, ports)
        self._has_stepped = False
        self._stop_deadline: float | None = None
        self._drain: Drain | None = None
        self._resize_reason: str | None = None
        self._checkpoint_requests = plan.checkpoint_requests
        self._autopsy = Autopsy(plan, ports)
        self._diagnosis_requests = plan.diagnosis_requests
        self._profiles = ProfileRequests(plan, ports, listener)
        self._failed_saves: set[int] = set()
        """Steps whose checkpoint some rank could not write."""
        self._examine_at = 0.0
        """When ranks that waited for the storage are examined again."""
        self._stragglers = StragglerMonitor(plan, listener, ports.clock)
        self._preflight: PreflightWatch | None = None
        if plan.preflight is not None:
            self._preflight = PreflightWatch(plan.places, plan.preflight)

    def run(self) -> AttemptEnd:
        """Returns how the attempt ended.

        Raises FencedError when a newer driver is at work.
        """
        try:
            self._monitor.start()
            while True:
                end = self._turn()
                if end is not None:
                    return end
        finally:
            # Replies to this attempt's polls must not reach the next attempt's monitor.
            self._ports.group.drop_calls()

    def _turn(self) -> AttemptEnd | None:
        self._observe(_TURN_S)
        # Checked after replies are processed: a driver that was itself frozen must not
        # count its ranks as silent.
        self._monitor.check_clock(has_stepped=self._has_stepped)
        self._judge_nodes()
        if not self._monitor.failures and self._monitor.hang():
            self._examine_hang()
        if self._has_stepped:
            self._stragglers.observe(lambda: self._monitor.paces)
        self._commit()
        if self._monitor.failures:
            return self._await_root_cause()
        self._apply_desired_state(self._ports.outbox.desired)
        self._answer_diagnosis_request(self._ports.outbox.desired)
        self._profiles.apply(self._ports.outbox.desired)
        self._apply_drains()
        # Ranks that do not stop in time are killed.
        deadline = self._stop_deadline
        if deadline is not None and self._ports.clock() > deadline:
            return self._stopped(forced=True)
        end = attempt_end(self._monitor.states)
        if end is None:
            return None
        self._finish_commits(failing_storage.ENDED_S)
        # The last checkpoint may have failed: without it the attempt is not finished.
        if self._monitor.failures:
            return self._await_root_cause()
        if isinstance(end, RanksStopped):
            return self._stopped(forced=False)
        return end

    def _stopped(self, *, forced: bool) -> AttemptEnd:
        """Returns why the ranks stopped."""
        if self._drain is None:
            return RanksStopped(forced=forced, resize_reason=self._resize_reason)
        return drains.stopped_for(self._drain, forced=forced)

    # ---- observing

    def _stored(self) -> int:
        return self._ports.outbox.stored(self._plan.source)

    def _observe(self, timeout_s: float) -> None:
        for rank, lines in self._monitor.collect(timeout_s):
            self._committer.take_written(rank, lines)
            self._take_failed_saves(rank, lines)
            self._profiles.take(lines)
            if self._preflight is not None:
                self._preflight.take(rank, lines)
            if rank == 0 and lines:
                records = [to_record(line) for line in lines]
                # Records that are sent must also be in the next checkpoint, from which
                # a driver that restarts on another node sends them again.
                self._take_records(records)
                self._ports.outbox.relay(self._plan.source, records)

    def _take_failed_saves(self, rank: int, lines: Sequence[Line]) -> None:
        """Has each checkpoint that a rank could not write recorded, for its first rank."""
        for line in lines:
            if line.kind != CheckpointFailedReport.kind:
                continue
            data = line.value()["data"]
            # Rank 0's reports are sent as they are.
            if rank != 0 and data["step"] not in self._failed_saves:
                self._listener.save_failed(rank, data)
            self._failed_saves.add(data["step"])

    def _take_records(self, records: Sequence[Line]) -> None:
        """Adds rank 0's records to the ledger of the next checkpoint."""
        for line in records:
            record = line.value()
            data = record["data"]
            self._committer.take_record(record)
            if record["kind"] == StepReport.kind:
                # An adopted rank repeats records that a checkpoint already contains.
                if data["step"] > self._plan.last_commit:
                    self._committer.take_step(data["step"], record["n"])
                    self._has_stepped = True
                    self._listener.stepped(data)
            elif data.get("type") == f"rank.{PhaseReport.kind}":
                self._listener.phase(data["data"])
            elif data.get("type") == f"rank.{RuleReport.kind}":
                if data["data"]["verdict"] == "persistent":
                    self._listener.persistent_fault()

    # ---- examining

    def _examine_hang(self) -> None:
        """Examines all ranks before any is ended, and adds the failure."""
        if self._ports.clock() < self._examine_at:
            return
        examined = self._autopsy.examine(self._monitor.quiet_s, is_hang=True)
        # They may have gone on meanwhile, such as after a stall of the storage.
        self._observe(0)
        message = self._monitor.hang()
        if message is None or self._monitor.failures:
            return
        # A restart would end in the same wait, and lose steps.
        quiet_s = self._monitor.quiet_s
        if examined.waits_for_storage and quiet_s < failing_storage.STALL_S:
            if not self._examine_at:
                self._listener.storage_slow(examined.describe_stall(quiet_s))
            self._examine_at = self._ports.clock() + failing_storage.LOOK_EVERY_S
            return
        self._listener.diagnosed(examined.report, self._diagnosis_requests)
        self._monitor.fail(
            FailureKind.HANG, examined.describe_hang(message), examined.culprit
        )

    def _judge_nodes(self) -> None:
        """Judges what the ranks have measured, once; bad nodes are a failure."""
        if self._preflight is None or self._monitor.failures:
            return
        verdict = self._preflight.verdict(self._monitor.quiet_s)
        if verdict is None:
            return
        self._preflight = None
        self._listener.preflight(verdict)
        if verdict.bad:
            self._monitor.fail(FailureKind.PREFLIGHT, verdict.failure())
        elif verdict.blocked is not None:
            # No node is known to be bad, so it counts as a failure of the job.
            self._monitor.fail(FailureKind.HANG, verdict.failure())

    def _answer_diagnosis_request(self, desired: DesiredJob | None) -> None:
        """Examines the ranks once for all requests so far."""
        if desired is None or desired.diagnosis_requests <= self._diagnosis_requests:
            return
        self._diagnosis_requests = desired.diagnosis_requests
        examined = self._autopsy.examine(self._monitor.quiet_s, is_hang=False)
        self._listener.diagnosed(examined.report, self._diagnosis_requests)

    # ---- acting

    def _apply_desired_state(self, desired: DesiredJob | None) -> None:
        """Sends the ranks a stop or checkpoint command, once for each request."""
        stop = None
        if self._stop_deadline is None:
            self._resize_reason = self._listener.resize_reason()
            resizes = self._resize_reason is not None
            stop = decide_stop(self._plan, desired, resizes=resizes)
        if stop is not None:
            # Journaled first, so that a driver that restarts while the service is down
            # does not start the job again.
            if stop.stopping is not None:
                self._listener.stop_requested(stop.stopping)
            self._command(stop.command)
            self._stop_deadline = self._ports.clock() + self._plan.grace_s
        elif (
            desired is not None and desired.checkpoint_requests > self._checkpoint_requests
        ):
            self._command(Command.CHECKPOINT)
            self._checkpoint_requests = desired.checkpoint_requests
            self._listener.checkpoint_requested(self._checkpoint_requests)

    def _apply_drains(self) -> None:
        """Has the ranks save and stop when one of their nodes is about to go."""
        if self._stop_deadline is not None:
            return
        plan = self._plan
        now = self._ports.clock()
        deadlines = self._ports.drains.deadlines
        self._drain = drains.find_drain(deadlines, plan.places, now, plan.grace_s)
        if self._drain is None:
            return
        self._listener.draining(self._drain)
        self._command(Command.CHECKPOINT_AND_STOP)
        self._stop_deadline = self._drain.stop_by

    def _command(self, command: Command) -> None:
        """Sends a command to rank 0 alone.

        The ranks agree on the largest command in the reduction of the next step, so all
        of them follow it at the same step.
        """
        slot = self._plan.places[0].slot
        self._ports.group.command(slot, self._plan.fence, command)

    def _commit(self, retry_for_s: float = failing_storage.RUNNING_S) -> None:
        slow = self._committer.slow()
        if slow is not None:
            self._listener.storage_slow(slow)
        result = self._committer.advance(retry_for_s)
        if result is None:
            return
        if isinstance(result, Committed):
            self._monitor.release(result.released)
            self._listener.committed(result.whole, result.deleted)
        elif isinstance(result, CommitDelayed):
            self._listener.commit_delayed(result.message)
        else:
            self._monitor.fail(result.kind, result.message)

    def _finish_commits(self, retry_for_s: float) -> None:
        """Commits every whole checkpoint before the attempt counts as over."""
        self._commit(retry_for_s)
        while self._committer.wait():
            self._commit(retry_for_s)

    def _await_root_cause(self) -> AttemptFailed:
        """Waits briefly for more failures: the first is often not the root cause."""
        deadline = self._ports.clock() + ROOT_CAUSE_S
        while self._ports.clock() < deadline and not is_over(self._monitor.states):
            self._observe(_SHORT_TURN_S)
        # A checkpoint that was completed meanwhile is committed for the next attempt.
        # With copies in memory the next attempt may not need the storage at all.
        self._finish_commits(retry_for_s=0.0)
        failed = attempt_failure(
            self._monitor.failures, self._monitor.dead, self._monitor.ranks
        )
        if self._drain is None:
            return failed
        return drains.attribute(self._drain, failed)
