"""Records the progress of attempts while they run.

Owns: the changes that a step, a phase or a commit makes in records, journal, gauges and
spares, and how long a recovery took. Must not know: how ranks are observed.
"""

from collections import deque
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from megatron_ray.storage.errors import StorageError
from workers.decisions import recovery
from workers.decisions.faults.drains import Drain
from workers.decisions.faults.exclusions import faulty_node
from workers.decisions.goodput import Goodput
from workers.decisions.placement import RankPlace
from workers.decisions.preflight.verdict import Verdict
from workers.decisions.ranks.stragglers import SlowRank
from workers.decisions.recovery import RecoveryWatch
from workers.driver.attempt.bad_nodes import avoid_nodes
from workers.driver.attempt.growth import Growth
from workers.driver.attempt.spares import SparePool
from workers.driver.commit import WholeCheckpoint
from workers.driver.context import JobContext
from workers.driver.relay import describe_failed_save
from workers.protocol.events import EventType
from workers.protocol.states import AttemptState, DesiredState, JobState


class JobProgress:
    """The progress of one job over the attempts of one incarnation.

    It is the `AttemptListener` of each of them.
    """

    def __init__(self, job: JobContext) -> None:
        self._job = job
        self._highest_step = 0
        self._recovery: RecoveryWatch | None = None
        self._spares: SparePool | None = None
        self._growth: Growth | None = None
        self._goodput = Goodput()
        self._faults: deque[tuple[EventType, str, Sequence[int]]] = deque()
        """Events about the storage that are not recorded yet, because it fails."""

    def on_attempt_failed(self) -> None:
        """Starts measuring the recovery."""
        self._record_faults()
        self._recovery = RecoveryWatch(self._job.ports.clock(), self._highest_step)

    def on_attempt_starting(self) -> None:
        """Stores the step from which the recovery resumes."""
        self._goodput.held(self._job.ports.clock())
        if self._recovery is not None:
            self._recovery.from_step = self._job.entry.first_step

    def on_attempt_running(self, spares: SparePool, growth: Growth) -> None:
        """Sets spares and growth of the attempt that has started running."""
        self._goodput.held(self._job.ports.clock())
        self._spares = spares
        self._growth = growth

    def on_released(self) -> None:
        """The job waits without resources."""
        self._goodput.released(self._job.ports.clock())

    # ---- the attempt's listener

    def stepped(self, data: dict[str, Any]) -> None:
        """Rank 0 has done a step."""
        # Called for each step of rank 0, so frequent work must be cheap.
        self._goodput.step(data["step"], data.get("step_s", 0.0))
        ratio = self._goodput.ratio(self._job.ports.clock())
        self._job.ports.gauges.update(data, self._job.entry.attempt, ratio)
        self._record_running()
        if self._spares is not None:
            self._spares.maintain()
        # What the nodes of dead ranks have reported since.
        avoid_nodes(self._job, self._job.ports.dead_rank_files.take_bad_nodes())
        if self._growth is not None:
            self._growth.stepped(data)
        # A recovery ends with the first step that no earlier attempt had reached.
        step = data["step"]
        self._highest_step = max(self._highest_step, step)
        if self._recovery is None:
            return
        split = self._recovery.step(step, self._job.ports.clock())
        if split is not None:
            self._recovery = None
            message = recovery.describe(split, self._job.entry.attempt)
            self._job.records.event("job.recovered", message, data=split)

    def phase(self, data: dict[str, Any]) -> None:
        """Rank 0 has finished a phase of its start."""
        if self._recovery is not None:
            self._recovery.phase(data)

    def committed(self, whole: WholeCheckpoint, deleted: Sequence[str]) -> None:
        """A checkpoint is committed, and others are deleted."""
        self._record_faults()
        self.record_commit(whole.step, whole.path, whole.bytes_written, whole.loss)
        for path in deleted:
            self._job.records.deleted(path)

    def stop_requested(self, desired: DesiredState) -> None:
        """The ranks are about to get a stop command."""
        self._job.write(stopping=desired)

    def draining(self, drain: Drain) -> None:
        """The ranks are about to get a stop command, because nodes of theirs go."""
        now = self._job.ports.clock()
        remaining_s = None
        if drain.deadline is not None:
            remaining_s = round(drain.deadline - now, 1)
        data = {"nodes": dict(drain.nodes), "deadline_s": remaining_s}
        message = drain.sentence(now)
        self._job.records.event("node.draining", message, "warn", data, drain.ranks)

    def storage_slow(self, message: str) -> None:
        """A checkpoint takes longer than it should."""
        self._job.records.event("storage.slow", message, "warn")

    def save_failed(self, rank: int, data: dict[str, Any]) -> None:
        """A rank other than 0 could not write its part of a checkpoint."""
        message = describe_failed_save(rank, data)
        self._record_fault(EventType.RANK_CHECKPOINT_FAILED, message, (rank,))

    def commit_delayed(self, message: str) -> None:
        """A checkpoint is not committed yet, because the storage has refused it."""
        self._record_fault(EventType.CHECKPOINT_DELAYED, message)

    def _record_fault(
        self, code: EventType, message: str, ranks: Sequence[int] = ()
    ) -> None:
        """Records a fault of the storage once that takes records again."""
        self._faults.append((code, message, ranks))
        self._record_faults()

    def _record_faults(self) -> None:
        while self._faults:
            code, message, ranks = self._faults[0]
            try:
                self._job.records.event(code, message, "warn", ranks=ranks)
            except StorageError:
                return
            self._faults.popleft()

    def resize_reason(self) -> str | None:
        """Returns why the ranks are to stop and go on at another size, if they are."""
        job = self._job
        dp = job.resized_dp()
        if dp is not None:
            return f"from dp={job.spec.parallel.dp} to dp={dp}"
        if self._growth is None:
            return None
        return self._growth.reason()

    def checkpoint_requested(self, checkpoint_requests: int) -> None:
        """The ranks got checkpoint commands, `checkpoint_requests` in all."""
        self._job.write(checkpoint_requests=checkpoint_requests)

    def preflight(self, verdict: Verdict) -> None:
        """The nodes were measured."""
        job = self._job
        job.records.preflight(verdict)
        if verdict.has_passed:
            nodes = {*job.entry.measured_nodes, *map(attrgetter("node_id"), verdict.nodes)}
            job.write(measured_nodes=tuple(sorted(nodes)))

    def persistent_fault(self) -> None:
        """A step that was computed wrongly before is good on the nodes of this attempt."""
        recheck = self._job.entry.recheck
        if recheck is None:
            return
        bad = faulty_node(recheck.node_id, recheck.address, recheck.step)
        avoid_nodes(self._job, [bad])
        self._job.write(recheck=None)

    def slow(self, slow: SlowRank, place: RankPlace) -> None:
        """A rank's own work has become slow."""
        self._job.records.slow(slow, place)

    def recovered(self, slow: SlowRank, place: RankPlace) -> None:
        """A slow rank is as fast as its peers again."""
        self._job.records.recovered(place)

    def profiled(self, report: dict[str, Any]) -> None:
        """A rank has written a profile, or cannot; see ProfileReport."""
        self._job.records.profile(report)

    def diagnosed(self, report: dict[str, Any], diagnosis_requests: int) -> None:
        """The ranks were examined; `diagnosis_requests` are carried out in all."""
        self._job.records.diagnosis(report)
        if diagnosis_requests > self._job.entry.diagnosis_requests:
            self._job.write(diagnosis_requests=diagnosis_requests)

    def record_commit(self, step: int, path: str, size: int, loss: float | None) -> None:
        """Records a committed checkpoint, and journals its step when it is the newest."""
        # Recorded before the journal is written: a restarted driver records all
        # committed checkpoints again, and known ones are dropped.
        self._job.records.committed(step, path, size, loss)
        if step > self._job.entry.last_commit:
            self._job.write(last_commit=step)

    def _record_running(self) -> None:
        """The attempt's first step makes the job a running one."""
        job = self._job
        if job.records.attempt_state(job.entry.attempt) is AttemptState.RUNNING:
            return
        # A job that is being cancelled does not become running again.
        if job.desired_state is DesiredState.RUN:
            job.records.state(JobState.RUNNING)
        job.records.attempt(AttemptState.RUNNING, job.world_size)
