"""Holds the state of a job for one incarnation of its driver.

Owns: the journal entry, the epoch, the records, the state that the service desires.
Shared by all phases. Must not know: Ray, HTTP, which phase follows.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ray.checkpoint.directory import RunIdentity
from megatron_ray.parallel_dims import ParallelDims
from workers.decisions.elasticity import resized_dp, with_dp
from workers.decisions.job_phases import Transition
from workers.decisions.journal_entry import JournalEntry, Phase
from workers.decisions.observations import ResumeRequested, StopRequested
from workers.decisions.slot_assignment import num_slots
from workers.driver.commit import contained_records
from workers.driver.journal import ForeignJournalError, Journal
from workers.driver.ports import JobPorts
from workers.driver.records.job_records import JobRecords
from workers.exceptions import WorkersError
from workers.protocol.job import JobSpec
from workers.protocol.states import DesiredState
from workers.protocol.wire import DesiredJob
from workers.rank.messages import Fence

_ATTACH_TURN_S = 0.2


class DriverReplacedError(WorkersError):
    """A newer incarnation of the driver has taken over this job."""


class JobContext:
    """One incarnation's view of its job; the constructor takes the next epoch.

    Raises StorageError, JournalError, and ForeignJournalError when the folder belongs to
    another job.
    """

    def __init__(self, job_id: str, job_dir: str, ports: JobPorts) -> None:
        self.job_id = job_id
        self.job_dir = job_dir
        self.ports = ports
        self._spec: JobSpec | None = None
        self._journal = Journal(ports.open_storage(job_dir))
        self.previous_entry = self._journal.latest()
        """The entry that an earlier incarnation left; None for a new job."""
        # Checked before anything is written, so that another job's folder stays
        # unchanged.
        if self.previous_entry is not None and self.previous_entry.job_id != job_id:
            raise ForeignJournalError(job_dir, self.previous_entry.job_id)
        entry = self.previous_entry or JournalEntry(job_id=job_id, epoch=0)
        # The epoch is durable before anything is sent with it; workers and service then
        # refuse the previous incarnation.
        self.entry = entry.model_copy(update={"epoch": entry.epoch + 1})
        self._journal.write(self.entry)
        # Some reports may exist in checkpoints only: their rank's node may be lost, and
        # the previous driver may have died before it sent them.
        from_checkpoints = {}
        if self.previous_entry is not None:
            from_checkpoints = contained_records(job_dir)
        logged = ports.outbox.open(self.entry.epoch, from_checkpoints)
        self.records = JobRecords(ports.outbox, lambda: self.entry.attempt, logged)

    def write(self, **changes: Any) -> None:
        """Changes fields of the journal entry, durable on return."""
        self.entry = self.entry.model_copy(update=changes)
        self._journal.write(self.entry)
        if "spec" in changes:
            self._spec = None

    def commit(self, transition: Transition) -> None:
        """Records and journals a transition, which enters its phase."""
        # Records before the journal: see Transition.
        if transition.attempt is not None:
            status = transition.attempt
            self.records.attempt(
                status.state, self.world_size, status.reason, status.message
            )
        if transition.job is not None:
            job = transition.job
            self.records.state(job.state, job.reason, job.message)
        self.write(phase=transition.phase, **transition.journal)

    @property
    def spec(self) -> JobSpec:
        """The resolved spec. Raises ValueError before the agent has sent it."""
        if self._spec is None:
            if self.entry.spec is None:
                raise ValueError("the job's spec is not known yet")
            self._spec = JobSpec.from_mapping(self.entry.spec)
        return self._spec

    @property
    def run(self) -> RunIdentity:
        """The run that the job's checkpoints belong to.

        The journal keeps other jobs out of the folder, so checkpoints that earlier
        versions wrote there are the job's own.
        """
        damaged = [path.rpartition("/")[2] for path in self.entry.damaged]
        return RunIdentity(self.job_id, owns_unnamed=True, damaged=tuple(damaged))

    @property
    def world_size(self) -> int:
        """Ranks of the attempt, which are fewer than the spec's after a shrink."""
        spec = self.spec
        if self.entry.dp is not None:
            spec = with_dp(spec, self.entry.dp)
        return ParallelDims.of(spec.parallel).world_size

    @property
    def keeps_copies(self) -> bool:
        """Whether ranks keep copies of their states in memory."""
        return (
            self.spec.checkpoint.peer_every_steps is not None and len(self.entry.ranks) > 1
        )

    @property
    def num_slots(self) -> int:
        """Maximum number of worker processes of the job at one time."""
        return num_slots(ParallelDims.of(self.spec.parallel), self.entry.bundle_size)

    def resized_dp(self) -> int | None:
        """Returns the data-parallel size that the service desires, if it is another one."""
        desired = self.desired
        if desired is None:
            return None
        return resized_dp(self.spec, desired)

    def unmapped_slots(self) -> list[int]:
        """Returns the slots with a process that is no rank: spares, half-started ones."""
        mapped = {place.slot for place in self.entry.ranks}
        return [slot for slot in self.ports.group.slots if slot not in mapped]

    @property
    def fence(self) -> Fence:
        """Attempt and epoch, by which workers tell a newer driver from an older one."""
        return Fence(self.entry.attempt, self.entry.epoch)

    @property
    def desired(self) -> DesiredJob | None:
        """The service's last request; None before this incarnation has reached it."""
        return self.ports.outbox.desired

    @property
    def revision(self) -> int:
        """Number of the service's last request; -1 before the first."""
        if self.desired is None:
            return -1
        return self.desired.revision

    @property
    def desired_state(self) -> DesiredState:
        """The state that the job is to have now.

        Until the service has been reached, it is the state that an earlier incarnation
        began to carry out, so that a cancelled job never restarts because the service
        is down.
        """
        # The service's state is newer than the journal's.
        if self.desired is not None:
            return self.desired.desired
        return self.entry.stopping or DesiredState.RUN

    @property
    def avoided_nodes(self) -> dict[str, str]:
        """Why living nodes must not be used, by node id."""
        avoided = dict(self.entry.avoid)
        if self.desired is not None:
            avoided.update(self.desired.avoid_nodes)
        return avoided

    def check_replaced(self) -> None:
        """Raises DriverReplacedError when a newer incarnation is at work."""
        if self.ports.outbox.replaced:
            raise DriverReplacedError(self.ports.outbox.replaced)

    def stop_requested(self) -> StopRequested | None:
        """Returns the request to cancel or pause the job, if any.

        Data are prepared to the end, because that holds no resources; a job in READY is
        paused once. Raises DriverReplacedError.
        """
        self.check_replaced()
        desired = self.desired_state
        if desired is DesiredState.CANCEL or (
            desired is DesiredState.PAUSE and not self._is_pause_done()
        ):
            return StopRequested(desired, self.revision)
        return None

    def _is_pause_done(self) -> bool:
        """Whether a pause has nothing to do in this phase, now or yet."""
        if self.entry.phase is Phase.PREPARING:
            return True
        released = self.entry.given_back
        return (
            self.entry.phase is Phase.READY
            and released is not None
            and released.revision >= self.revision
        )

    def resume_requested(self, timeout_s: float) -> ResumeRequested | None:
        """Returns the request to resume the ended job, if any.

        Waits up to `timeout_s` for the service's first request.
        """
        deadline = self.ports.clock() + timeout_s
        while self.desired is None and self.ports.clock() < deadline:
            self.check_replaced()
            self.ports.outbox.wait(_ATTACH_TURN_S)
        desired = self.desired
        if desired is None or desired.resumes <= self.entry.resumes:
            return None
        return ResumeRequested(
            desired.resumes,
            desired.spec,
            desired.revision,
            has_other_data=self._has_other_data(desired.spec),
        )

    def _has_other_data(self, values: Mapping[str, Any]) -> bool:
        """Whether a spec has other data than those that are prepared."""
        if self.entry.prepared is None:
            return False
        # As fields, because a spec of an earlier version lacks those that were added since.
        spec = JobSpec.from_mapping(values)
        return (spec.data, spec.training.seq_length) != (
            self.spec.data,
            self.spec.training.seq_length,
        )
