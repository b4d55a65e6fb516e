"""Shows that a job lives and where it is, and sees the others, by files in a folder.

Owns: the files, the thread that renews and reads them, when a job counts as lost. Must not
know: what jobs do together.

A job's file is renewed several times within the time after which it would count as lost.
Clocks of machines are never compared: a job lives while its file changes, by the clock of
the reader. While the folder cannot be read, no time passes.
"""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from megatron_ray.storage.errors import MissingFileError, StorageError
from megatron_ray.storage.storage import Storage
from megatron_ray.training.replica_jobs.membership import Heartbeat, from_json, to_json

_RENEWALS = 8
"""Renewals of a file within the time after which its job counts as lost."""
_MIN_PERIOD_S = 0.1
_CLOSE_S = 2.0


def file_of(group: int) -> str:
    """Returns the name of a job's file in the folder."""
    return f"group-{group}.json"


@dataclass
class _Seen:
    beat: Heartbeat
    quiet_s: float = 0.0
    """Seconds since the file has last changed."""


class Heartbeats:
    """Renews this job's heartbeat until `close`, and reads those of the other groups.

    `watch` is called after each reading of a thread.
    """

    def __init__(
        self,
        storage: Storage,
        own: Heartbeat,
        num_groups: int,
        lost_after_s: float,
        watch: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage = storage
        self.own = own
        """This job's heartbeat."""
        self._others = [group for group in range(num_groups) if group != own.group]
        self._lost_after_s = lost_after_s
        self._watch = watch
        self._clock = clock
        self._seen: dict[int, _Seen] = {}
        self._read_at = clock()
        # The file and what was read belong to two threads.
        self._lock = threading.RLock()
        self._is_closed = threading.Event()
        self._period_s = max(_MIN_PERIOD_S, lost_after_s / _RENEWALS)
        self.renew()
        self.read()
        if self._seen:
            # Files of jobs that have ended do not change.
            time.sleep(1.5 * self._period_s)
            self.read()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def living(self) -> Mapping[int, Heartbeat]:
        """Returns the heartbeat of each job that lives, this one included, by group."""
        with self._lock:
            living = {self.own.group: self.own}
            for group, seen in self._seen.items():
                if seen.quiet_s < self._lost_after_s:
                    living[group] = seen.beat
            return living

    def give_up(self, beat: Heartbeat) -> None:
        """Counts a job as lost until its file changes."""
        with self._lock:
            seen = self._seen.get(beat.group)
            if seen is not None and seen.beat.incarnation == beat.incarnation:
                seen.quiet_s = self._lost_after_s

    def close(self) -> None:
        """Ends the thread, which deletes the file, so that others go on at once."""
        self._is_closed.set()
        # A storage that stalls must not delay the end of the job.
        self._thread.join(_CLOSE_S)

    def renew(self, **changes: Any) -> None:
        """Writes this job's file anew, with changed fields of its heartbeat.

        A storage that refuses it is tried again with the next renewal.
        """
        with self._lock, suppress(StorageError):
            self.own = replace(self.own, count=self.own.count + 1, **changes)
            self._storage.write_bytes_atomic(file_of(self.own.group), to_json(self.own))

    def read(self) -> None:
        """Reads the files of the other groups."""
        with self._lock:
            now = self._clock()
            passed_s = now - self._read_at
            self._read_at = now
            for group in self._others:
                self._read_group(group, passed_s)

    def _read_group(self, group: int, passed_s: float) -> None:
        try:
            beat = from_json(self._storage.read_bytes(file_of(group)))
        except MissingFileError:
            self._seen.pop(group, None)
            return
        except (StorageError, ValueError):
            # Nothing is known of the job now.
            return
        seen = self._seen.get(group)
        if seen is None:
            # It may have been left behind, so it must change first.
            self._seen[group] = _Seen(beat, self._lost_after_s)
        elif seen.beat == beat:
            seen.quiet_s += passed_s
        else:
            self._seen[group] = _Seen(beat)

    def _run(self) -> None:
        while not self._is_closed.wait(self._period_s):
            self.renew()
            self.read()
            self._watch()
        with suppress(StorageError):
            self._storage.delete_file(file_of(self.own.group))
