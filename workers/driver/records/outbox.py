"""Sends a driver's records to the service and keeps them until they are stored.

Owns: the driver's own numbered records on storage, the threads that call the service.
Must not know: Ray, torch, what a record means.

The driver's records are written to the job's folder before they are sent, so that a
restarted driver continues their numbers; a rank's are in its spool. Nothing here blocks
training: while the service is down, records are queued.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from megatron_ray.reports import MonitorReport
from megatron_ray.storage.storage import Storage
from workers.protocol.wire import DesiredJob, Record, RecordBatch
from workers.rank.spool import Line
from workers.service_client import (
    ReplacedError,
    ServiceClient,
    ServiceRefusedError,
    ServiceUnavailableError,
)

DRIVER = "driver"
FOLDER = "driver"
_PER_FILE = 100
_PER_BATCH = 500
_NUMBERS_PER_BATCH = 50_000
"""Numbers of callbacks, of which one record may have thousands: some megabytes."""
_RETRY_S = (0.2, 0.5, 1.0, 2.0)
_LONG_POLL_S = 20.0
_MIN_POLL_INTERVAL_S = 0.1
"""Minimum interval between polls, in case the service answers at once without news."""


class RecordLog:
    """The driver's own records on storage.

    Files hold up to 100 records; the last one is rewritten whole with each record.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._tail: list[Record] = []
        self.last_n = 0

    def load(self) -> list[Record]:
        """Returns every record written by earlier incarnations, in order."""
        records = []
        for file in self._storage.list(FOLDER):
            if file.name.startswith("records-") and file.name.endswith(".jsonl"):
                content = self._storage.read_bytes(f"{FOLDER}/{file.name}")
                for line in content.splitlines():
                    records.append(Record.model_validate_json(line))
        if records:
            self.last_n = records[-1].n
        self._tail = records[len(records) - len(records) % _PER_FILE :]
        return records

    def append(self, kind: str, data: dict[str, Any], attempt: int) -> Record:
        """Numbers a record and makes it durable. Raises StorageError."""
        record = Record(
            n=self.last_n + 1, at=time.time(), kind=kind, attempt=attempt, data=data
        )
        # Memory changes only after the write, so a number is free again after a
        # StorageError.
        tail = [*self._tail, record]
        name = f"{FOLDER}/records-{(record.n - 1) // _PER_FILE:06d}.jsonl"
        lines = [row.model_dump_json() + "\n" for row in tail]
        self._storage.write_bytes_atomic(name, "".join(lines).encode())
        self.last_n = record.n
        self._tail = tail
        if len(tail) == _PER_FILE:
            self._tail = []
        return record


@dataclass
class _Source:
    """The records of one producer that the service may lack, in order."""

    pending: deque[Record] = field(default_factory=deque)
    stored: int = 0
    """Highest number known to be stored in the service."""

    @property
    def last_n(self) -> int:
        """Highest number that is stored or pending."""
        if self.pending:
            return self.pending[-1].n
        return self.stored

    def mark_stored(self, n: int) -> None:
        """Drops records that the service has stored."""
        self.stored = max(self.stored, n)
        while self.pending and self.pending[0].n <= self.stored:
            self.pending.popleft()

    def prepend_missing(self, lines: Iterable[Line]) -> None:
        """Puts the lines that follow the stored ones before the pending ones.

        The service accepts no gaps, so lines after a gap are left out.
        """
        end: int | None = None
        if self.pending:
            end = self.pending[0].n
        missing: list[Record] = []
        for line in lines:
            is_next = line.n == self.stored + 1 + len(missing)
            if is_next and (end is None or line.n < end):
                missing.append(Record.model_validate_json(line.text))
        self.pending.extendleft(reversed(missing))


def _first_records(pending: Iterable[Record]) -> Iterator[Record]:
    """Yields as many records as fit into one request, at least one."""
    num_numbers = 0
    for record in islice(pending, _PER_BATCH):
        if record.kind == MonitorReport.kind:
            num_numbers += len(record.data["numbers"])
        if num_numbers > _NUMBERS_PER_BATCH:
            return
        yield record


class Outbox:
    """Pushes records in the background; `desired` is the latest desired state.

    Two threads call the service: one pushes records, one long-polls. All state below
    `_changed` is shared with the driver's thread and guarded by it.
    """

    def __init__(self, job_id: str, log: RecordLog) -> None:
        self._job_id = job_id
        self._log = log
        self._epoch = 0
        self._num_logged = 0
        self._from_checkpoints: dict[str, Sequence[Line]] = {}
        self._changed = threading.Condition()
        self._sources: dict[str, _Source] = {}
        self._address: tuple[str, str] | None = None
        self._is_synced = False
        self._is_closed = False
        self.replaced: str | None = None
        """Reason why this driver must end, once the service has refused its epoch."""
        self.desired: DesiredJob | None = None

    def open(
        self, epoch: int, from_checkpoints: Mapping[str, Sequence[Line]] | None = None
    ) -> list[Record]:
        """Starts sending; returns the records of earlier incarnations.

        `from_checkpoints` holds ranks' reports by source, in order, that may be missing
        in the ranks' own files. The service may lack some of both.
        """
        logged = self._log.load()
        self._num_logged = self._log.last_n
        self._epoch = epoch
        self._from_checkpoints = dict(from_checkpoints or {})
        self._sources[DRIVER] = _Source(deque(logged))
        for loop in (self._push_loop, self._poll_loop):
            threading.Thread(target=loop, name=loop.__name__, daemon=True).start()
        return logged

    def attach(self, url: str, token: str, desired: DesiredJob) -> None:
        """Sets the service's address and the desired state."""
        # A new address wakes threads that pause after a failure at the old one.
        with self._changed:
            self._address = (url, token)
            self._accept(desired)
            self._changed.notify_all()

    def append(self, kind: str, data: dict[str, Any], attempt: int) -> None:
        """Adds a record of the driver's own, durable on return. Raises StorageError."""
        record = self._log.append(kind, data, attempt)
        with self._changed:
            self._sources[DRIVER].pending.append(record)
            self._changed.notify_all()

    def relay(self, source: str, lines: Iterable[Line]) -> None:
        """Adds a rank's reports; those that are stored or pending already are dropped."""
        with self._changed:
            # A restarted driver rereads a spool from its last released report.
            queue = self._source(source)
            last_n = queue.last_n
            for line in lines:
                if line.n > last_n:
                    queue.pending.append(Record.model_validate_json(line.text))
            self._changed.notify_all()

    def stored(self, source: str) -> int:
        """Returns the highest number of a source that the service has stored."""
        with self._changed:
            return self._source(source).stored

    def unstored_before(self, source: str) -> list[Record]:
        """Returns what the service may lack of the ranks' records before this source's.

        In order within each of their sources.
        """
        records: list[Record] = []
        with self._changed:
            for name, queue in self._sources.items():
                if name not in (DRIVER, source):
                    records += queue.pending
            # Until the service has answered which of these it has stored.
            for name, lines in self._from_checkpoints.items():
                if name != source:
                    records += [Record.model_validate_json(line.text) for line in lines]
        return records

    def last(self, source: str) -> int:
        """Returns the highest number of a source that is stored or pending."""
        with self._changed:
            return self._source(source).last_n

    def wait(self, timeout_s: float) -> None:
        """Waits until a new desired state has arrived or more records are stored."""
        with self._changed:
            self._changed.wait(timeout_s)

    def flush(self, *, timeout_s: float | None = None) -> bool:
        """Waits until every record is stored, without limit if there is no timeout.

        Returns False when time runs out or this driver is replaced.
        """
        deadline = float("inf")
        if timeout_s is not None:
            deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._has_unsent():
                remaining = deadline - time.monotonic()
                if self.replaced or remaining <= 0:
                    return False
                self._changed.wait(min(1.0, remaining))
        return True

    def close(self) -> None:
        """Ends the threads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    # ---- under the lock

    def _source(self, name: str) -> _Source:
        return self._sources.setdefault(name, _Source())

    def _has_unsent(self) -> bool:
        return bool(self._from_checkpoints) or any(
            source.pending for source in self._sources.values()
        )

    def _accept(self, desired: DesiredJob) -> None:
        """Keeps the newest request; two threads and the agent deliver them in any order."""
        if self.desired is None or desired.revision >= self.desired.revision:
            self.desired = desired

    def _next_batches(self) -> list[RecordBatch]:
        batches = []
        for name, source in self._sources.items():
            if source.pending:
                records = tuple(_first_records(source.pending))
                batch = RecordBatch(
                    job_id=self._job_id, epoch=self._epoch, source=name, records=records
                )
                batches.append(batch)
        return batches

    # ---- the two threads

    def _push_loop(self) -> None:
        self._sync_loop(self._push_once)

    def _poll_loop(self) -> None:
        self._sync_loop(self._poll_once)

    def _sync_loop(self, exchange: Callable[[ServiceClient], None]) -> None:
        """Repeats an exchange with the service at its current address until closed."""
        client = None
        client_address = None
        failures = 0
        while not self._is_closed and not self.replaced:
            with self._changed:
                if self._address is None:
                    self._changed.wait(1.0)
                    continue
                address = self._address
            if client is None or address != client_address:
                if client is not None:
                    client.close()
                client = ServiceClient(*address)
                client_address = address
            try:
                exchange(client)
                failures = 0
            except ReplacedError as error:
                with self._changed:
                    self.replaced = str(error)
                    self._changed.notify_all()
            except (ServiceUnavailableError, ServiceRefusedError):
                # A refusal is retried like an outage: the agent may pass a new token or
                # address, or an operator may repair the service.
                self._pause(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
                failures += 1
        if client is not None:
            client.close()

    def _pause(self, seconds: float) -> None:
        """Sleeps until the time is over, the address changes or the outbox is closed."""
        with self._changed:
            before = self._address
            self._changed.wait_for(
                lambda: self._is_closed or self._address != before, seconds
            )

    def _push_once(self, client: ServiceClient) -> None:
        # First asks which records are stored, so that none is sent twice and reports
        # from checkpoints are inserted at the right place.
        if not self._is_synced:
            cursor = client.cursor(self._job_id, self._epoch, self._num_logged)
            stored = cursor.stored
            with self._changed:
                for name, n in stored.items():
                    self._source(name).mark_stored(n)
                for name, lines in self._from_checkpoints.items():
                    self._source(name).prepend_missing(lines)
                self._from_checkpoints = {}
                self._is_synced = True
        with self._changed:
            # Records stay pending until the service confirms them, because a batch may
            # be lost.
            batches = self._next_batches()
            if not batches:
                self._changed.wait(1.0)
        for batch in batches:
            reply = client.records(batch)
            with self._changed:
                self._source(batch.source).mark_stored(reply.stored)
                self._accept(reply.desired)
                self._changed.notify_all()

    def _poll_once(self, client: ServiceClient) -> None:
        known_revision = 0
        if self.desired is not None:
            known_revision = self.desired.revision
        desired = client.desired_job(self._job_id, known_revision, _LONG_POLL_S)
        with self._changed:
            # Compared again under the lock: the other thread may have received a newer
            # one.
            is_new = self.desired is None or desired.revision > self.desired.revision
            self._accept(desired)
            self._changed.notify_all()
        if not is_new:
            self._pause(_MIN_POLL_INTERVAL_S)
