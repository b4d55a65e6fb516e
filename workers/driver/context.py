"""What one incarnation of a driver knows of its job and says about it.

Owns: journal entry, epoch, records, the service's wish.

Shared by the phases (`job_life`) and the attempts (`attempts`). Must not know: Ray,
HTTP, what comes next.
"""

from typing import Any

from megatron_ray.parallel_dims import ParallelDims
from workers.decisions.slot_assignment import num_slots
from workers.driver.commit import contained_records
from workers.driver.exceptions import BackToQueue, DriverReplacedError, JobEnds
from workers.driver.journal import ForeignJournalError, Journal, JournalEntry, Phase
from workers.driver.outbox import Outbox, RecordLog
from workers.driver.records import JobRecords
from workers.protocol.job import JobSpec
from workers.protocol.states import DesiredState, JobState, StatusReason
from workers.protocol.wire import DesiredJob
from workers.rank.messages import Fence


class JobContext:
    """Takes the next epoch when made. Raises StorageError, JournalError."""

    def __init__(self, job_id: str, job_dir: str) -> None:
        self.job_id = job_id
        self.job_dir = job_dir
        self._spec: JobSpec | None = None
        self._journal = Journal(job_dir)
        self.found = self._journal.latest()
        """The entry that an earlier incarnation left; None for a new job."""
        if self.found is not None and self.found.job_id != job_id:
            raise ForeignJournalError(job_dir, self.found.job_id)
        entry = self.found or JournalEntry(job_id=job_id, epoch=0)
        self.entry = entry.model_copy(update={"epoch": entry.epoch + 1})
        self._journal.write(self.entry)
        book = RecordLog(job_dir)
        said = book.load()
        recalled = {} if self.found is None else contained_records(job_dir)
        self.outbox = Outbox(job_id, book, said, self.entry.epoch, recalled)
        self.say = JobRecords(self.outbox, lambda: self.entry.attempt, said)

    def write(self, **changes: Any) -> None:
        """Journal first, then act."""
        self.entry = self.entry.model_copy(update=changes)
        self._journal.write(self.entry)

    @property
    def spec(self) -> JobSpec:
        """The resolved spec. Raises ValueError before the agent has told it."""
        if self._spec is None:
            if self.entry.spec is None:
                raise ValueError("the job's spec is not known yet")
            self._spec = JobSpec.from_mapping(self.entry.spec)
        return self._spec

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return ParallelDims.of(self.spec.parallel).world_size

    @property
    def num_slots(self) -> int:
        """Worker processes that the job can ever have at once."""
        return num_slots(ParallelDims.of(self.spec.parallel))

    @property
    def fence(self) -> Fence:
        """Who this driver is to its workers."""
        return Fence(self.entry.attempt, self.entry.epoch)

    @property
    def desired(self) -> DesiredJob | None:
        """What the service last asked for; None until this incarnation has heard it."""
        return self.outbox.desired

    @property
    def revision(self) -> int:
        """Number of the service's last wish; -1 before the first."""
        return self.desired.revision if self.desired else -1

    @property
    def wish(self) -> DesiredState:
        """What is to be done now: the service's word, and until it is heard what an
        earlier incarnation has begun to carry out.
        """
        return (
            self.desired.desired
            if self.desired
            else self.entry.stopping or DesiredState.RUN
        )

    def check_replaced(self) -> None:
        """Raises DriverReplacedError when a newer incarnation is at work."""
        if self.outbox.replaced:
            raise DriverReplacedError(self.outbox.replaced)

    def stop_if_unwanted(self) -> None:
        """Raises JobEnds or BackToQueue when the job is no longer wanted to run;
        DriverReplacedError when this driver is not.
        """
        self.check_replaced()
        if self.wish is DesiredState.CANCEL:
            raise JobEnds(JobState.CANCELLED, StatusReason.USER_CANCELLED)
        if self.wish is DesiredState.PAUSE and self.entry.phase not in (
            Phase.PREPARING,
            Phase.READY,
        ):
            raise BackToQueue(JobState.PAUSED, None, "", self.revision)
