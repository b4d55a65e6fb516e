"""Stores the batches of records that drivers send.

Owns: fencing of old drivers and the numbering of records. Must not know: HTTP, waiting,
what a record means (`service.jobs.records`).

A batch is applied as a whole or not at all. Records that were stored before are skipped,
so sending a batch again is always safe.
"""

import re
from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.exceptions import (
    DriverReplacedError,
    ProtocolUnsupportedError,
    RecordGapError,
    RequestInvalidError,
)
from service.jobs import lifecycle, queue
from service.jobs.records import RecordApplier
from service.store.database import Store
from service.store.schema import JobRow, SourceRow
from workers.protocol.states import JobState, StatusReason
from workers.protocol.wire import PROTOCOL, Record, RecordBatch

DRIVER = "driver"
"""Source of the driver's own records."""
_SOURCE = re.compile(r"driver|a\d{1,9}/r\d{1,9}")
IndexedRecord = tuple[int, Record]
"""A record and its index in the batch as it was sent, for pointers in errors."""


def apply_batch(store: Store, session: Session, batch: RecordBatch) -> int:
    """Stores a batch; returns the highest number now stored of its source.

    Raises NotFoundError, ProtocolUnsupportedError, DriverReplacedError, RecordGapError,
    RequestInvalidError.
    """
    check_protocol(batch.protocol)
    if not _SOURCE.fullmatch(batch.source):
        raise RequestInvalidError.of_field(
            "/source",
            "record_invalid",
            f"unknown source {batch.source[:80]!r}; use 'driver' or 'a<attempt>/r<rank>'",
        )
    # The lock comes before the epoch: an old driver must not slip in between.
    job = lifecycle.lock(session, batch.job_id)
    take_epoch(job, batch.epoch)
    row = session.get(SourceRow, (job.number, batch.source))
    if row is None:
        row = SourceRow(job=job.number, source=batch.source, stored=0)
        session.add(row)
    # Records that were stored before are skipped, and the rest must have no gaps.
    new_records = _new_records(batch, row.stored)
    _check_numbers(batch.source, new_records, row.stored)
    RecordApplier(store, session, job, batch.source).apply(new_records)
    # In the same transaction as what the records changed: both are stored or neither.
    row.stored += len(new_records)
    return row.stored


def check_protocol(protocol: int) -> None:
    """Raises ProtocolUnsupportedError unless it is this version's or the one before."""
    if protocol not in (PROTOCOL, PROTOCOL - 1):
        raise ProtocolUnsupportedError(
            f"protocol {protocol} is not supported, only {PROTOCOL} and {PROTOCOL - 1}; run "
            "the service and the workers in versions that are at most one apart",
            protocol=PROTOCOL,
        )


def take_epoch(job: JobRow, epoch: int) -> None:
    """Lets a driver of this or a higher epoch take over the job.

    Raises DriverReplacedError for a lower one.
    """
    # Epochs start at 1; 0 in the row means that no driver has come yet.
    if epoch < max(job.epoch, 1):
        raise DriverReplacedError(
            f"epoch {epoch} was replaced by epoch {job.epoch} of {job.id}; exit without "
            "changing anything",
            epoch=job.epoch,
        )
    job.epoch = epoch


def stored_numbers(session: Session, job: JobRow) -> dict[str, int]:
    """Returns the highest number stored of each source of a job."""
    rows = session.scalars(sa.select(SourceRow).where(SourceRow.job == job.number))
    return {row.source: row.stored for row in rows}


def fail_if_lost(
    session: Session, job: JobRow, stored: Mapping[str, int], last_n: int
) -> bool:
    """Fails a job whose folder lacks records that were sent before; returns whether it did.

    A driver writes its records to the folder before it sends them. One that lacks some
    was emptied or restored, and numbers its next ones as those that were stored, which
    would all be dropped.
    """
    if last_n >= stored.get(DRIVER, 0):
        return False
    message = (
        f"{job.job_dir} has lost files of this job: its newest record there is number {last_n} "
        f"of {stored[DRIVER]}; restore the folder and resume the job, or submit the spec as a "
        "new job"
    )
    event = lifecycle.NewEvent("job.failed", message, "error")
    reason = StatusReason.STORAGE_ERROR
    if not JobState(job.status).is_terminal:
        lifecycle.transition(session, job, JobState.FAILED, reason, event)
        job.problem = lifecycle.stored_problem("job_failed", message, reason=reason)
        queue.admit_jobs(session, lifecycle.lock_cluster(session, job.cluster))
    return True


def _new_records(batch: RecordBatch, stored: int) -> list[IndexedRecord]:
    new_records = []
    for index, record in enumerate(batch.records):
        if record.n > stored:
            new_records.append((index, record))
    return new_records


def _check_numbers(source: str, records: Sequence[IndexedRecord], stored: int) -> None:
    for expected, (index, record) in enumerate(records, start=stored + 1):
        if record.n != expected:
            raise RecordGapError(
                f"record {index} of source {source} has n={record.n}, expected {expected}; "
                f"resend from n={stored + 1} without gaps",
                stored=stored,
            )
