"""What a driver has to say, until the service has stored it.

Owns: the driver's own numbered records and the pushing thread.

The driver's records are written to the job's folder before they are sent, so that a
restart goes on numbering; a rank's are in its spool. Nothing here blocks training:
while the service is away, lines wait. Must not know: Ray, torch, what a record means.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ray.storage.storage import open_storage
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
_RETRY_S = (0.2, 0.5, 1.0, 2.0)


class RecordLog:
    """The driver's own records on storage: files of up to 100, the last one rewritten
    whole with each record.
    """

    def __init__(self, job_dir: str) -> None:
        self._storage = open_storage(job_dir)
        self._tail: list[Record] = []
        self.last_n = 0

    def load(self) -> list[Record]:
        """Every record written by earlier incarnations, in order."""
        found: list[Record] = []
        for entry in self._storage.list(FOLDER):
            if entry.name.startswith("records-") and entry.name.endswith(".jsonl"):
                lines = self._storage.read_bytes(f"{FOLDER}/{entry.name}").splitlines()
                found += [Record.model_validate_json(line) for line in lines]
        self.last_n = found[-1].n if found else 0
        self._tail = found[len(found) - len(found) % _PER_FILE :]
        return found

    def append(self, kind: str, data: dict[str, Any], attempt: int) -> Record:
        """Numbers a record and makes it durable. Raises StorageError."""
        record = Record(
            n=self.last_n + 1, at=time.time(), kind=kind, attempt=attempt, data=data
        )
        tail = [*self._tail, record]
        name = f"{FOLDER}/records-{(record.n - 1) // _PER_FILE:06d}.jsonl"
        self._storage.write_bytes_atomic(
            name, "".join(item.model_dump_json() + "\n" for item in tail).encode()
        )
        self.last_n = record.n
        self._tail = [] if len(tail) == _PER_FILE else tail
        return record


@dataclass
class _Source:
    """One producer's records on their way."""

    pending: deque[Record] = field(default_factory=deque)
    stored: int = 0


class Outbox:
    """Pushes records in the background; `desired` is what the service last asked for."""

    def __init__(
        self,
        job_id: str,
        book: RecordLog,
        said: Iterable[Record],
        epoch: int,
        recalled: Mapping[str, Sequence[Line]] | None = None,
    ) -> None:
        """`said`: what the book holds; `recalled`: ranks' reports by source, in order,
        that are kept elsewhere than in their own files.

        The service may lack some of either.
        """
        self._job_id = job_id
        self._book = book
        self._epoch = epoch
        self._recalled = dict(recalled or {})
        self._sources: dict[str, _Source] = {DRIVER: _Source(deque(said))}
        self._changed = threading.Condition()
        self._address: tuple[str, str] | None = None
        self._synced = False
        self._closed = False
        self.replaced: str | None = None
        self.desired: DesiredJob | None = None
        self._threads = [
            threading.Thread(target=run, name=run.__name__, daemon=True)
            for run in (self._push, self._follow)
        ]
        for thread in self._threads:
            thread.start()

    def attach(self, url: str, token: str, desired: DesiredJob) -> None:
        """Where the service is now, and what it wants."""
        with self._changed:
            self._address = (url, token)
            self._learn(desired)
            self._changed.notify_all()

    def say(self, kind: str, data: dict[str, Any], attempt: int) -> None:
        """A record of the driver's own, durable when this returns.

        Raises StorageError.
        """
        record = self._book.append(kind, data, attempt)
        with self._changed:
            self._sources[DRIVER].pending.append(record)
            self._changed.notify_all()

    def relay(self, source: str, lines: Iterable[Line]) -> None:
        """A rank's reports; lines that the service has already stored are dropped."""
        with self._changed:
            queue = self._sources.setdefault(source, _Source())
            last = queue.pending[-1].n if queue.pending else queue.stored
            queue.pending.extend(
                Record.model_validate_json(line.text) for line in lines if line.n > last
            )
            self._changed.notify_all()

    def stored(self, source: str) -> int:
        """Highest number of a source that the service has stored, as far as is known."""
        with self._changed:
            return self._sources.setdefault(source, _Source()).stored

    def last(self, source: str) -> int:
        """Highest number of a source that is stored or on its way."""
        with self._changed:
            found = self._sources.setdefault(source, _Source())
            return found.pending[-1].n if found.pending else found.stored

    def wait(self, timeout_s: float) -> None:
        """Until something is wanted or stored anew, at most so long."""
        with self._changed:
            self._changed.wait(timeout_s)

    def flush(self, *, timeout_s: float | None = None) -> bool:
        """Waits until everything said is stored (for ever, without a timeout); False
        when time runs out or this driver is replaced.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._recalled or any(
                source.pending for source in self._sources.values()
            ):
                left = None if deadline is None else deadline - time.monotonic()
                if self.replaced or (left is not None and left <= 0):
                    return False
                self._changed.wait(1.0 if left is None else min(1.0, left))
        return True

    def close(self) -> None:
        """Ends the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _learn(self, desired: DesiredJob) -> None:
        """Under the lock: keeps the newest wish."""
        if self.desired is None or desired.revision >= self.desired.revision:
            self.desired = desired

    def _push(self) -> None:
        self._talk(self._push_once)

    def _follow(self) -> None:
        self._talk(self._follow_once)

    def _talk(self, once: Callable[[ServiceClient], None]) -> None:
        """Repeats one exchange for as long as the driver lives, over a link to wherever
        the service is now.
        """
        link = None
        address = None
        failures = 0
        while not self._closed and not self.replaced:
            with self._changed:
                if self._address is None:
                    self._changed.wait(1.0)
                    continue
                current = self._address
            if link is None or current != address:
                if link is not None:
                    link.close()
                link = ServiceClient(*current)
                address = current
            try:
                once(link)
                failures = 0
            except ReplacedError as why:
                with self._changed:
                    self.replaced = str(why)
                    self._changed.notify_all()
            except (ServiceUnavailableError, ServiceRefusedError):
                # A refusal is no different from silence here: the agent brings a new
                # token or address, or a person mends the service.
                self._pause(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
                failures += 1
        if link is not None:
            link.close()

    def _pause(self, seconds: float) -> None:
        """Sleeps, but not through a new address or the end."""
        with self._changed:
            before = self._address
            self._changed.wait_for(lambda: self._closed or self._address != before, seconds)

    def _push_once(self, link: ServiceClient) -> None:
        if not self._synced:
            found = link.cursor(self._job_id, self._epoch).stored
            with self._changed:
                for name, n in found.items():
                    self._store(name, n)
                self._recall()
                self._synced = True
        with self._changed:
            waiting = [
                (name, source) for name, source in self._sources.items() if source.pending
            ]
            if not waiting:
                self._changed.wait(1.0)
                return
            batches = [
                (
                    name,
                    tuple(
                        source.pending[index]
                        for index in range(min(_PER_BATCH, len(source.pending)))
                    ),
                )
                for name, source in waiting
            ]
        for name, records in batches:
            batch = RecordBatch(
                job_id=self._job_id, epoch=self._epoch, source=name, records=records
            )
            reply = link.records(batch)
            with self._changed:
                self._store(name, reply.stored)
                self._learn(reply.desired)
                self._changed.notify_all()

    def _recall(self) -> None:
        """Under the lock, as soon as it is known what the service has: puts what
        follows that before what is on its way.
        """
        for name, lines in self._recalled.items():
            source = self._sources.setdefault(name, _Source())
            end = source.pending[0].n if source.pending else None
            missing: list[Record] = []
            for line in lines:
                if line.n == source.stored + 1 + len(missing) and (
                    end is None or line.n < end
                ):
                    missing.append(Record.model_validate_json(line.text))
            source.pending.extendleft(reversed(missing))
        self._recalled = {}

    def _store(self, name: str, n: int) -> None:
        """Under the lock: forgets what the service has."""
        source = self._sources.setdefault(name, _Source())
        source.stored = max(source.stored, n)
        while source.pending and source.pending[0].n <= source.stored:
            source.pending.popleft()

    def _follow_once(self, link: ServiceClient) -> None:
        after = self.desired.revision if self.desired else 0
        desired = link.desired_job(self._job_id, after, 20.0)
        with self._changed:
            fresh = self.desired is None or desired.revision > self.desired.revision
            self._learn(desired)
            self._changed.notify_all()
        if not fresh:
            self._pause(
                0.1
                # a service that answers at once with nothing new must not be asked in a
                # tight loop
            )
