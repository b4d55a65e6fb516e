"""Writes and reads a rank's report file, the spool.

Owns: numbering, appending, segments, reading from a cursor. Must not know: Ray, torch,
its readers.

One JSON line `{"n", "at", "kind", "attempt", "data"}` per report, one unbuffered
O_APPEND write each: a report costs the training thread a few microseconds and survives
the death of the process. A torn last line (power cut, full disk) is cut off.
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import PydanticSerializationError, from_json, to_json

SEGMENT_BYTES = 16 << 20
"""Size at which a spool continues in a new file; released files are deleted."""
READ_BYTES = 8 << 20
"""Size of the lines that one read returns, but for the last of them."""
_BEGINNING = b'{"n":'
_TAIL_BYTES = 1 << 20
"""Length of a file's end that is searched for a torn line; no line is that long."""


@dataclass(frozen=True)
class Line:
    """One report line of the file."""

    n: int
    kind: str
    text: bytes
    """The JSON line, without the newline."""

    def value(self) -> dict[str, Any]:
        """Returns the parsed line."""
        return dict(from_json(self.text))


class Spool:
    """Appends to a report file; several threads of one process may write.

    Numbers continue where an existing file ends. Without `segment_bytes` it is a single
    file, which may also be a device.
    """

    def __init__(
        self, path: Path, attempt: int, *, segment_bytes: int | None = SEGMENT_BYTES
    ) -> None:
        self.path = path
        self.attempt = attempt
        self._segment_bytes = segment_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        existing = []
        if segment_bytes is not None:
            existing = segments(path)
        elif path.is_file():
            existing = [(1, path)]
        current = path
        if existing:
            _, current = existing[-1]
            # A process that died while writing may have left an incomplete line, which
            # would corrupt the next line.
            _cut_torn_line(current)
        self.last_n = _last_n(existing)
        self._file = _open_append(current)
        self._size = os.fstat(self._file).st_size

    def append(self, kind: str, data: Mapping[str, Any]) -> int:
        """Writes one line and returns its number. Raises OSError if the disk does."""
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
            # One unbuffered system call, so that a killed process leaves complete lines.
            try:
                written = os.write(self._file, line)
            except OSError as error:
                # The system's error does not name the file.
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            # An incomplete line is truncated, so that the next line does not follow it.
            if written != len(line):
                os.ftruncate(self._file, self._size)
                raise OSError(
                    f"only {written} of {len(line)} bytes fitted into {self.path}: the disk is full"
                )
            # Only a complete line uses up its number, so a failed write leaves no gap.
            self.last_n = n
            self._size += written
            if self._segment_bytes is not None and self._size >= self._segment_bytes:
                self._next_segment()
            return n

    def release(self, n: int) -> None:
        """Deletes the segments whose lines are all numbered `n` or lower.

        The segment being written stays.
        """
        with self._lock:
            existing = segments(self.path)
        for index, (_, path) in enumerate(existing[:-1]):
            # The next segment's name gives the end of a segment, so none need be read.
            first_n_of_next, _ = existing[index + 1]
            if first_n_of_next <= n + 1:
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
        self._file = _open_append(path)
        self._size = 0


class SpoolReader:
    """Reads a spool from a cursor.

    It keeps its file and offset, so following a growing file reads new bytes only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._after = 0
        self._segment = path
        self._offset = 0

    def read(self, after: int, limit: int = 2000) -> list[Line]:
        """Returns at most `limit` lines with n > after, in order, of READ_BYTES at most.

        Lines that were deleted are left out; a torn last line is not returned.
        """
        if after != self._after:
            self._seek(after)
        lines: list[Line] = []
        num_bytes = 0
        while len(lines) < limit and num_bytes < READ_BYTES:
            new_lines = self._read_segment(
                after, limit - len(lines), READ_BYTES - num_bytes
            )
            lines += new_lines
            num_bytes += sum(len(line.text) for line in new_lines)
            # This segment has been read to its end; the next one may contain more lines.
            if not new_lines and not self._advance():
                break
            after = self._after
        return lines

    def _seek(self, after: int) -> None:
        """Moves to the last segment that may hold the line after `after`."""
        self._after = after
        self._offset = 0
        self._segment = self.path
        for first_n, path in segments(self.path):
            is_before = first_n <= after + 1
            is_oldest_left = self._segment == self.path and not self.path.exists()
            if is_before or is_oldest_left:
                self._segment = path

    def _read_segment(self, after: int, limit: int, num_bytes: int) -> list[Line]:
        lines: list[Line] = []
        try:
            with open(self._segment, "rb") as file:
                file.seek(self._offset)
                for raw_line in file:
                    # A line without newline is still being written, or torn.
                    is_torn = not raw_line.endswith(b"\n")
                    if is_torn or len(lines) >= limit or num_bytes <= 0:
                        break
                    self._offset += len(raw_line)
                    num_bytes -= len(raw_line)
                    line = parse_line(raw_line)
                    if line is not None and line.n > after:
                        lines.append(line)
                        self._after = line.n
        except FileNotFoundError:
            return []
        return lines

    def _advance(self) -> bool:
        """Moves to the next segment and returns whether there is one."""
        for first_n, path in segments(self.path):
            if first_n > self._after and path != self._segment:
                self._segment = path
                self._offset = 0
                return True
        return False


def report_path(folder: Path, attempt: int, rank: int) -> Path:
    """Returns the path of a rank's spool below the job's folder on its node."""
    return folder / f"attempt-{attempt:04d}" / f"rank-{rank:05d}.jsonl"


def parse_line(raw_line: bytes) -> Line | None:
    """Parses a line of a spool; returns None if it is not one.

    A file that another process continued may contain a torn line in the middle.
    """
    # Null, lists and objects without a number are not lines either.
    try:
        value = from_json(raw_line)
        return Line(int(value["n"]), str(value["kind"]), raw_line.rstrip(b"\n"))
    except (ValueError, KeyError, TypeError):
        return None


def holds_reports(path: Path) -> bool:
    """Returns whether a file is a spool: empty, or with a report as its first line.

    Raises OSError.
    """
    with open(path, "rb") as file:
        beginning = file.read(len(_BEGINNING))
    # Only the beginning, because the line itself may be torn.
    return beginning in (b"", _BEGINNING)


def segments(path: Path) -> list[tuple[int, Path]]:
    """Returns (number of the first line, file) of a spool's existing segments, in order.

    The first segment has the spool's own name, the others have a number appended.
    """
    existing = []
    prefix = path.name + "."
    if path.parent.is_dir():
        for entry in path.parent.iterdir():
            # The folder also contains other files of the rank, such as its log.
            number = entry.name.removeprefix(prefix)
            if entry.name.startswith(prefix) and number.isdigit():
                existing.append((int(number), entry))
    existing.sort()
    if path.exists():
        existing.insert(0, (1, path))
    return existing


def _open_append(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def _encode(record: Mapping[str, Any]) -> bytes:
    """Returns a record as JSON; infinities and NaN, which JSON lacks, become null."""
    # pydantic's encoder and parser, because those of `json` take seven times as long.
    try:
        return to_json(record, inf_nan_mode="null")
    except PydanticSerializationError:
        return to_json(_without_surrogates(record), inf_nan_mode="null")


def _without_surrogates(value: Any) -> Any:
    """Returns a value whose lone surrogates are written as escapes.

    An error's message contains them if it names a file whose name is not UTF-8.
    """
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_without_surrogates(key): _without_surrogates(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return [_without_surrogates(item) for item in value]
    return value


def _cut_torn_line(path: Path) -> None:
    """Removes an unfinished line at the end of a file."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - _TAIL_BYTES)
        file.seek(start)
        tail = file.read()
        if not tail.endswith(b"\n"):
            file.truncate(start + tail.rfind(b"\n") + 1)


def _last_n(existing: Sequence[tuple[int, Path]]) -> int:
    """Returns the number of a spool's last line; 0 for a new one."""
    last_n = 0
    for first_n, segment in existing:
        # The name of an empty segment gives the last number of the one before it.
        last_n = max(last_n, first_n - 1)
        with open(segment, "rb") as file:
            for raw_line in file:
                line = parse_line(raw_line)
                if line is not None:
                    last_n = line.n
    return last_n
