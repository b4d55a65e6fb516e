"""Writes the ranks' logs into the job's folder, where the service reads them.

Owns: the files and their caps. Must not know: Ray, HTTP.

Local files are written in place at the given offset, so that a restarted driver may
write a piece again. Object stores cannot append: there the beginning of each log is
kept in memory and uploaded as a whole from time to time.
"""

import contextlib
import os
import time
from pathlib import Path

from megatron_ray.storage.errors import MissingFileError, StorageError
from megatron_ray.storage.storage import LocalStorage, Storage

FOLDER = "logs"
CAP_BYTES = 64 << 20
"""Limit of a rank's log of one attempt, in a folder."""
OBJECT_CAP_BYTES = 1 << 20
"""Limit of a log in an object store, where every update uploads the whole log."""
_PUT_EVERY_S = 10.0
_CUT_MARK = b"\n[log cut here: it may hold 64 MiB]\n"


def log_name(attempt: int, rank: int) -> str:
    """Returns the name of a rank's log below the job's folder."""
    return f"{FOLDER}/attempt-{attempt:04d}/rank-{rank:05d}.log"


class JobLogs:
    """The logs of one job.

    Storage errors never affect training: bytes are dropped, and `problem` holds the
    latest error.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._folder: Path | None = None
        if isinstance(storage, LocalStorage):
            self._folder = Path(storage.root)
        self._objects: dict[str, bytearray] = {}
        self._unwritten: set[str] = set()
        self._put_at = time.monotonic()
        self.problem: str | None = None

    def size(self, attempt: int, rank: int) -> int:
        """Returns the number of bytes written: the offset at which to continue."""
        name = log_name(attempt, rank)
        if self._folder is None:
            return len(self._object(name))
        try:
            return (self._folder / name).stat().st_size
        except FileNotFoundError:
            return 0
        # Writing a log again from its beginning changes nothing.
        except OSError as error:
            self.problem = f"cannot read {name}: {error.strerror}"
            return 0

    def write(self, attempt: int, rank: int, offset: int, data: bytes) -> None:
        """Writes bytes at their offset."""
        if not data:
            return
        name = log_name(attempt, rank)
        if self._folder is not None:
            self._write_local(self._folder / name, offset, data)
            return
        log = self._object(name)
        if len(log) < OBJECT_CAP_BYTES:
            # This piece replaces everything from its offset on.
            del log[offset:]
            log += data[: OBJECT_CAP_BYTES - len(log)]
            self._unwritten.add(name)
        if time.monotonic() - self._put_at > _PUT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Uploads logs that have changed to an object store."""
        self._put_at = time.monotonic()
        for name in sorted(self._unwritten):
            try:
                self._storage.write_bytes_atomic(name, bytes(self._objects[name]))
                self._unwritten.discard(name)
            except StorageError as error:
                self.problem = str(error)

    def _write_local(self, path: Path, offset: int, data: bytes) -> None:
        # The file ends with the mark; later bytes remain only in the rank's own log.
        if offset >= CAP_BYTES:
            return
        end = offset + len(data)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                # At the given offset, so that writing a piece twice changes nothing.
                os.pwrite(file, data, offset)
                if end >= CAP_BYTES:
                    os.pwrite(file, _CUT_MARK, end)
            finally:
                os.close(file)
        except OSError as error:
            self.problem = f"cannot write {path}: {error.strerror}"

    def _object(self, name: str) -> bytearray:
        """Returns a log of an object store; its earlier part is read once."""
        if name not in self._objects:
            log = bytearray()
            with contextlib.suppress(MissingFileError, StorageError):
                log += self._storage.read_bytes(name)
            self._objects[name] = log
        return self._objects[name]
