"""A rank's report file and log file.

Owns: appending, reading from a cursor, capping. Must not know: Ray, torch, who reads.

One JSON line `{"n", "at", "kind", "attempt", "data"}` per report, one unbuffered
O_APPEND write each: a report costs the training thread some microseconds and survives
the death of the process. A torn last line (power cut, full disk) is cut off.
"""

import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import PydanticSerializationError, from_json, to_json

SEGMENT_BYTES = 16 << 20
"""A spool goes on in a new file at this size; files that nobody needs any more are
deleted."""
LOG_BYTES = 16 << 20
"""A log file is emptied, with a notice, at this size; what was shipped before stays in
the job's folder."""


@dataclass(frozen=True)
class Line:
    """One report as it stands in the file."""

    n: int
    kind: str
    text: bytes
    """The JSON line, without the newline."""

    def value(self) -> dict[str, Any]:
        """The parsed line."""
        return dict(from_json(self.text))


class Spool:
    """Appends to a report file; several threads of one process may write.

    Numbers go on where an existing file ends.
    """

    def __init__(
        self, path: Path, attempt: int, *, segment_bytes: int | None = SEGMENT_BYTES
    ) -> None:
        self.path = path
        self.attempt = attempt
        self._segment_bytes = segment_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        current = segments(path)[-1][1] if segments(path) else path
        _cut_torn_line(current)
        self.last_n = _last_n(path)
        self._file = os.open(current, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._file).st_size

    def append(self, kind: str, data: Mapping[str, Any]) -> int:
        """Writes one line and returns its number. Raises OSError when the disk does."""
        with self._lock:
            n = self.last_n + 1
            record = {
                "n": n,
                "at": time.time(),
                "kind": kind,
                "attempt": self.attempt,
                "data": data,
            }
            line = _encode(record) + b"\n"
            written = os.write(self._file, line)
            if written != len(line):
                os.ftruncate(self._file, self._size)
                raise OSError(
                    f"only {written} of {len(line)} bytes fitted into {self.path}: the disk is full"
                )
            self.last_n = n
            self._size += written
            if self._segment_bytes is not None and self._size >= self._segment_bytes:
                self._next_segment()
            return n

    def release(self, n: int) -> None:
        """Deletes segments all of whose lines are at or below `n`: everybody who needs
        them has them.
        """
        with self._lock:
            found = segments(self.path)
        for (_, path), (first_of_next, _) in zip(found, found[1:], strict=False):
            if first_of_next <= n + 1:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file; appending afterwards raises OSError."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _next_segment(self) -> None:
        os.close(self._file)
        path = self.path.with_name(f"{self.path.name}.{self.last_n + 1:012d}")
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = 0


class SpoolReader:
    """Reads a spool from a cursor; keeps its place, so that following a growing file
    costs only what is new.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._after = 0
        self._segment = path
        self._offset = 0

    def read(self, after: int, limit: int = 2000) -> list[Line]:
        """Lines with n > after, in order, at most `limit`.

        Lines deleted meanwhile are left out; a torn last line is not returned.
        """
        if after != self._after:
            self._seek(after)
        found: list[Line] = []
        while len(found) < limit:
            more = self._read_segment(after, limit - len(found))
            found += more
            if not more and not self._advance():
                break
            after = self._after
        return found

    def _seek(self, after: int) -> None:
        self._after = after
        self._offset = 0
        self._segment = self.path
        for first, path in segments(self.path):
            if first <= after + 1 or (
                self._segment == self.path and not self.path.exists()
            ):
                self._segment = path

    def _read_segment(self, after: int, limit: int) -> list[Line]:
        found: list[Line] = []
        try:
            with open(self._segment, "rb") as file:
                file.seek(self._offset)
                for text in file:
                    if not text.endswith(b"\n") or len(found) >= limit:
                        break
                    self._offset += len(text)
                    line = parse_line(text)
                    if line is not None and line.n > after:
                        found.append(line)
                        self._after = line.n
        except FileNotFoundError:
            return []
        return found

    def _advance(self) -> bool:
        """Goes to the next segment, when there is one."""
        later = [
            path
            for first, path in segments(self.path)
            if first > self._after and path != self._segment
        ]
        if not later:
            return False
        self._segment = later[0]
        self._offset = 0
        return True


def parse_line(text: bytes) -> Line | None:
    """A line of a spool; None when it is not one (a torn write in the middle of a file
    that another process went on writing).
    """
    try:
        value = from_json(text)
        return Line(int(value["n"]), str(value["kind"]), text.rstrip(b"\n"))
    except (ValueError, KeyError, TypeError):
        return None


def segments(path: Path) -> list[tuple[int, Path]]:
    """(first n, file) of each existing segment of a spool, in order; the first carries
    the spool's own name.
    """
    found = [(1, path)] if path.exists() else []
    prefix = path.name + "."
    if path.parent.is_dir():
        named = [
            entry
            for entry in path.parent.iterdir()
            if entry.name.startswith(prefix) and entry.name[len(prefix) :].isdigit()
        ]
        found += sorted((int(entry.name[len(prefix) :]), entry) for entry in named)
    return found


def _encode(record: Mapping[str, Any]) -> bytes:
    """JSON has no infinities and no NaN: they become null. pydantic's encoder and
    parser, because json's take seven times as long.
    """
    try:
        return to_json(record, inf_nan_mode="null")
    except PydanticSerializationError:
        return to_json(_encodable(record), inf_nan_mode="null")


def _encodable(value: Any) -> Any:
    """An error's text may hold half a character (a file name that is no UTF-8): it is
    written as its escape.
    """
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(item) for item in value]
    return value


def _cut_torn_line(path: Path) -> None:
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, "rb+") as file:
        content_end = file.seek(0, os.SEEK_END)
        start = max(0, content_end - (1 << 20))
        file.seek(start)
        tail = file.read()
        if not tail.endswith(b"\n"):
            file.truncate(start + tail.rfind(b"\n") + 1)


def _last_n(path: Path) -> int:
    last = 0
    for first, segment in segments(path):
        last = max(last, first - 1)
        with open(segment, "rb") as file:
            for text in file:
                line = parse_line(text)
                last = line.n if line else last
    return last


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
        os.dup2(self._file, 1)
        os.dup2(self._file, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115 - lives as long as the process
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115

    def read(self, offset: int, max_bytes: int) -> tuple[int, bytes]:
        """(offset of the first byte returned, bytes): from `offset`, or from the oldest
        byte still there.
        """
        with self._lock:
            start = max(offset, self._dropped)
            data = (
                os.pread(self._file, max_bytes, start - self._dropped)
                if max_bytes > 0
                else b""
            )
            if os.fstat(self._file).st_size > self._cap_bytes:
                self._empty()
            return start, data

    def _empty(self) -> None:
        size = os.fstat(self._file).st_size
        os.ftruncate(self._file, 0)
        self._dropped += size
        os.write(
            self._file,
            f"[log emptied after {self._dropped} bytes: it may hold {self._cap_bytes}]\n".encode(),
        )

    def close(self) -> None:
        """Closes this object's descriptor; 1 and 2 stay where they are."""
        with self._lock:
            os.close(self._file)
