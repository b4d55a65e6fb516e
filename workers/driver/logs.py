"""The ranks' logs in the job's folder.

Owns: writing shipped bytes where the service reads them. Must not know: Ray, HTTP.

Local folders are written in place at the byte's own offset, so that a restarted driver
may ship a piece again. Object stores cannot append: there the newest piece of each log
is kept in memory and put as a whole now and then.
"""

import contextlib
import os
import time
from pathlib import Path

from megatron_ray.storage.errors import MissingFileError, StorageError
from megatron_ray.storage.storage import LocalStorage, open_storage

FOLDER = "logs"
CAP_BYTES = 64 << 20
"""Per rank and attempt, in a folder."""
OBJECT_CAP_BYTES = 1 << 20
"""The same in an object store."""
_PUT_EVERY_S = 10.0


def log_name(attempt: int, rank: int) -> str:
    """Name of a rank's log below the job's folder."""
    return f"{FOLDER}/attempt-{attempt:04d}/rank-{rank:05d}.log"


class JobLogs:
    """Logs of one job.

    Storage trouble never reaches training: bytes are dropped, and the newest problem is
    kept to be told.
    """

    def __init__(self, job_dir: str) -> None:
        self._storage = open_storage(job_dir)
        self._local = (
            Path(self._storage.root) if isinstance(self._storage, LocalStorage) else None
        )
        self._objects: dict[str, bytearray] = {}
        self._dirty: set[str] = set()
        self._put_at = time.monotonic()
        self.problem: str | None = None

    def size(self, attempt: int, rank: int) -> int:
        """Bytes already shipped: where to go on from."""
        name = log_name(attempt, rank)
        if self._local is not None:
            path = self._local / name
            return path.stat().st_size if path.exists() else 0
        return len(self._object(name))

    def write(self, attempt: int, rank: int, offset: int, data: bytes) -> None:
        """Puts bytes at their offset."""
        if not data:
            return
        name = log_name(attempt, rank)
        if self._local is not None:
            self._write_local(self._local / name, offset, data)
            return
        held = self._object(name)
        if len(held) < OBJECT_CAP_BYTES:
            del held[offset:]
            held += data[: OBJECT_CAP_BYTES - len(held)]
            self._dirty.add(name)
        if time.monotonic() - self._put_at > _PUT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Puts what object stores do not have yet."""
        self._put_at = time.monotonic()
        for name in sorted(self._dirty):
            try:
                self._storage.write_bytes_atomic(name, bytes(self._objects[name]))
                self._dirty.discard(name)
            except StorageError as error:
                self.problem = str(error)

    def _write_local(self, path: Path, offset: int, data: bytes) -> None:
        if offset >= CAP_BYTES:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, data, offset)
                if offset + len(data) >= CAP_BYTES:
                    os.pwrite(
                        file, b"\n[log cut here: it may hold 64 MiB]\n", offset + len(data)
                    )
            finally:
                os.close(file)
        except OSError as error:
            self.problem = f"cannot write {path}: {error.strerror}"

    def _object(self, name: str) -> bytearray:
        if name not in self._objects:
            held = bytearray()
            with contextlib.suppress(MissingFileError, StorageError):
                held += self._storage.read_bytes(name)
            self._objects[name] = held
        return self._objects[name]
