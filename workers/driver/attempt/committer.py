"""Commits the checkpoints of one attempt.

Owns: the ledger, the running commit, which reports a commit makes superfluous. Must not
know: Ray, the service, what follows a failed commit.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.reports import CheckpointFailedReport, CheckpointReport
from megatron_ray.storage.errors import DiskFullError, StorageError
from workers.decisions.failures import FailureKind
from workers.decisions.faults.failing_storage import RUNNING_S, retry_s
from workers.decisions.faults.slow_storage import OpenCheckpoint, slow_storage
from workers.driver.attempt.plan import AttemptPlan
from workers.driver.commit import CheckpointLedger, WholeCheckpoint, commit_whole
from workers.driver.ports import JobPorts
from workers.rank.spool import Line


@dataclass(frozen=True)
class Committed:
    """A commit that succeeded."""

    whole: WholeCheckpoint
    deleted: Sequence[str]
    """Paths of checkpoints that retention has deleted."""
    released: dict[int, int]
    """Number of each rank's last report that is in the checkpoint."""


@dataclass(frozen=True)
class CommitFailed:
    """A commit that the storage refused."""

    step: int
    error: StorageError

    @property
    def kind(self) -> FailureKind:
        """Whether another attempt may succeed."""
        if isinstance(self.error, DiskFullError):
            return FailureKind.DISK_FULL
        return FailureKind.STORAGE

    @property
    def message(self) -> str:
        """Sentence for the history."""
        return f"the checkpoint of step {self.step} cannot be committed: {self.error}"


@dataclass(frozen=True)
class CommitDelayed:
    """A commit that the storage refused for the first time; it is tried again."""

    step: int
    error: StorageError

    @property
    def message(self) -> str:
        """Sentence for the history."""
        return (
            f"the checkpoint of step {self.step} is not committed yet, it is tried again: "
            f"{self.error}"
        )


@dataclass
class _Delayed:
    """A checkpoint whose commit is to be tried again."""

    whole: WholeCheckpoint
    since: float
    """When the storage refused it first."""
    num_failures: int
    retry_at: float = 0.0


class CheckpointCommitter:
    """Commits whole checkpoints in the executor, one at a time.

    In the executor, because storage may be slow while ranks must be polled. One at a
    time, so that retention never counts a checkpoint whose commit is still running.

    A commit that the storage refuses is tried again, because what the ranks have written
    is complete.
    """

    def __init__(self, plan: AttemptPlan, ports: JobPorts) -> None:
        self._plan = plan
        self._ports = ports
        self._ledger = CheckpointLedger(len(plan.places), plan.attempt)
        self._pending: tuple[WholeCheckpoint, Future[Sequence[str]]] | None = None
        self._delayed: _Delayed | None = None
        self._written_n: dict[int, dict[int, int]] = {}
        """Number of the CheckpointReport, by step and rank."""
        self._step_n: dict[int, int] = {}
        """Number of rank 0's step report, by step."""
        self._first_part_at: dict[int, float] = {}
        """When the first rank had written its part, by step."""
        self._commit_began_at = 0.0
        self._reported_slow: set[int] = set()

    def take_written(self, rank: int, lines: Sequence[Line]) -> None:
        """Adds a rank's reports that its part of a checkpoint is durable."""
        for line in lines:
            if line.kind == CheckpointFailedReport.kind:
                # This part is not late: the rank has given it up.
                self._reported_slow.add(line.value()["data"]["step"])
            if line.kind != CheckpointReport.kind:
                continue
            data = line.value()["data"]
            step = data["step"]
            # The ranks of an adopted attempt repeat reports that were committed before.
            if step > self._plan.last_commit:
                self._written_n.setdefault(step, {})[rank] = line.n
                self._first_part_at.setdefault(step, self._ports.clock())
                self._ledger.written(rank, step, data["path"], data["bytes_written"])

    def take_record(self, record: dict[str, Any]) -> None:
        """Adds a record of rank 0, which the next checkpoint will contain."""
        self._ledger.reported(record)

    def take_step(self, step: int, n: int) -> None:
        """Stores the number of a step's report."""
        self._step_n[step] = n

    def advance(
        self, retry_for_s: float = RUNNING_S
    ) -> Committed | CommitDelayed | CommitFailed | None:
        """Returns the result of a finished commit, once, and starts the next one.

        A commit that fails is tried again for `retry_for_s`.
        """
        result = None
        # Processed in the driver's thread, the only one that writes records and the
        # journal.
        if self._pending is not None:
            if not self._pending[1].done():
                return None
            result = self._take_result(retry_for_s)
        whole = self._next_whole()
        if whole is not None:
            future = self._ports.executor.submit(
                commit_whole,
                whole,
                self._plan.storage_path,
                self._plan.keep_last,
                self._plan.manifest,
                self._ports.open_storage,
            )
            self._pending = (whole, future)
            self._commit_began_at = self._ports.clock()
            self._first_part_at.pop(whole.step, None)
        return result

    def _next_whole(self) -> WholeCheckpoint | None:
        """Returns the checkpoint to commit now, if any."""
        delayed = self._delayed
        if delayed is not None:
            # Not a later one before it: each has the reports since the one before.
            if self._ports.clock() < delayed.retry_at:
                return None
            return delayed.whole
        whole = self._ledger.take_whole(self._ports.outbox.stored(self._plan.source))
        if whole is None:
            return None
        return replace(whole, reports=(*self._earlier(), *whole.reports))

    def slow(self) -> str | None:
        """Returns a sentence about a checkpoint that takes too long, once for each step."""
        now = self._ports.clock()
        for checkpoint in self._open_checkpoints():
            sentence = slow_storage(checkpoint, now)
            if sentence is not None and checkpoint.step not in self._reported_slow:
                self._reported_slow.add(checkpoint.step)
                return sentence
        return None

    def _open_checkpoints(self) -> Iterator[OpenCheckpoint]:
        if self._pending is not None:
            yield OpenCheckpoint(self._pending[0].step, self._commit_began_at)
        for step, since in self._first_part_at.items():
            written = self._written_n.get(step, {})
            missing = [
                rank for rank in range(len(self._plan.places)) if rank not in written
            ]
            if missing:
                yield OpenCheckpoint(step, since, missing)

    def wait(self) -> bool:
        """Waits for the running commit, or for the next try; returns False without one."""
        if self._pending is not None:
            self._pending[1].exception()
            return True
        if self._delayed is None:
            return False
        remaining_s = self._delayed.retry_at - self._ports.clock()
        self._ports.outbox.wait(max(0.0, remaining_s))
        return True

    def _earlier(self) -> Iterator[dict[str, Any]]:
        """Yields records of earlier attempts that the service lacks.

        No checkpoint has those of steps that an attempt does not repeat, as it continues
        from copies. Others are in checkpoints that retention deletes after this one.
        """
        for record in self._ports.outbox.unstored_before(self._plan.source):
            yield record.model_dump(mode="json")

    def _take_result(
        self, retry_for_s: float
    ) -> Committed | CommitDelayed | CommitFailed | None:
        assert self._pending is not None
        whole, future = self._pending
        self._pending = None
        delayed = self._delayed
        self._delayed = None
        try:
            deleted = future.result()
        # Parts are missing, which another try does not change.
        except CheckpointError as error:
            return CommitFailed(whole.step, error)
        except StorageError as error:
            now = self._ports.clock()
            failed = delayed or _Delayed(whole, now, 0)
            failed.num_failures += 1
            pause_s = retry_s(failed.num_failures, now - failed.since, retry_for_s)
            if pause_s is None:
                return CommitFailed(whole.step, error)
            failed.retry_at = now + pause_s
            self._delayed = failed
            if delayed is None:
                return CommitDelayed(whole.step, error)
            return None
        return Committed(whole, deleted, self._released_by(whole.step))

    def _released_by(self, step: int) -> dict[int, int]:
        """Reports that the checkpoint of a step makes superfluous, by rank."""
        released = self._written_n.pop(step, {})
        # The checkpoint contains rank 0's reports only up to the step; reports written
        # before its part was durable may belong to later steps.
        last_n = 0
        for reported in sorted(self._step_n):
            if reported <= step:
                last_n = max(last_n, self._step_n.pop(reported))
        if last_n and 0 in released:
            released[0] = min(released[0], last_n)
        return released
