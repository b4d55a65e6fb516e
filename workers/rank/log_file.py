"""Captures a rank's standard output and error in a file.

Owns: redirecting file descriptors 1 and 2, reading from an offset, the size limit. Must
not know: Ray, torch, its readers.
"""

import os
import sys
import threading
from pathlib import Path

LOG_BYTES = 16 << 20
"""Size at which a log file is emptied, with a notice; earlier bytes that were read are
in the job's folder."""


class LogFile:
    """A rank's standard output and error as one capped file, native crashes included.

    Offsets count every byte ever written.
    """

    def __init__(self, path: Path, *, cap_bytes: int = LOG_BYTES) -> None:
        self.path = path
        self._cap_bytes = cap_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._dropped = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def capture(self) -> None:
        """Points file descriptors 1 and 2, and Python's streams, at the file.

        Call it before torch is imported.
        """
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # Descriptors, not only Python's streams, because native code and child processes
        # write to them directly.
        os.dup2(self._file, 1)
        os.dup2(self._file, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115 - lives as long as the process
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115

    def read(self, offset: int, max_bytes: int) -> tuple[int, bytes]:
        """Returns (offset of the first byte, bytes), at most `max_bytes`.

        The bytes start at `offset`, or at the oldest byte still there.
        """
        with self._lock:
            start = max(offset, self._dropped)
            # The file starts at offset `_dropped`, because it may have been emptied before.
            data = b""
            if max_bytes > 0:
                data = os.pread(self._file, max_bytes, start - self._dropped)
            if os.fstat(self._file).st_size > self._cap_bytes:
                self._empty()
            return start, data

    def close(self) -> None:
        """Closes this object's descriptor; 1 and 2 still point at the file."""
        with self._lock:
            os.close(self._file)

    def _empty(self) -> None:
        size = os.fstat(self._file).st_size
        os.ftruncate(self._file, 0)
        self._dropped += size
        notice = (
            f"[log emptied after {self._dropped} bytes: its limit is {self._cap_bytes}]\n"
        )
        os.write(self._file, notice.encode())


def log_path(folder: Path, attempt: int, rank: int) -> Path:
    """Returns the path of a rank's log below the job's folder on its node."""
    return folder / f"attempt-{attempt:04d}" / f"rank-{rank:05d}.log"
