"""Reads the logs that a job's ranks have written.

Owns: the paths of logs in a job's folder. Must not know: HTTP, the database.
"""

from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import fs

from service.exceptions import NotFoundError, StorageUnavailableError


class LogPart(NamedTuple):
    """A part of a log."""

    size: int
    """Bytes in the file now."""
    text: str
    next_offset: int
    """Byte where the next part starts."""


def log_path(attempt: int, rank: int) -> str:
    """Returns the path of a rank's log, relative to the job's folder.

    It is made of numbers only, so no request can make it point elsewhere.
    """
    return f"logs/attempt-{attempt:04d}/rank-{rank:05d}.log"


def read_log(job_dir: str, attempt: int, rank: int, offset: int, limit: int) -> LogPart:
    """Returns at most `limit` bytes of a log from `offset` on.

    A log that is not there yet is empty. Raises StorageUnavailableError when the storage
    does not answer, NotFoundError for a link out of the job's folder.
    """
    try:
        # A folder or any URI that pyarrow knows: the job may write to an object store.
        system, root = fs.FileSystem.from_uri(job_dir)
        path = _path_inside(system, root, log_path(attempt, rank))
        info = system.get_file_info(path)
        # No error: a rank that has printed nothing yet has no file.
        if info.type != fs.FileType.File:
            return LogPart(0, "", offset)
        size = int(info.size or 0)
        if offset >= size:
            return LogPart(size, "", offset)
        with system.open_input_file(path) as file:
            file.seek(offset)
            raw: bytes = file.read(min(limit, size - offset))
    except (OSError, ValueError) as error:
        raise StorageUnavailableError(
            f"the job's storage {job_dir} does not answer: {error}; check that the service "
            "can reach it"
        ) from error
    # At the end of the file a truncated character is shown, because it may never be
    # completed.
    if offset + len(raw) < size:
        raw = _without_cut_character(raw)
    return LogPart(size, raw.decode("utf-8", errors="replace"), offset + len(raw))


def _path_inside(system: Any, root: str, relative: str) -> str:
    """Returns the file's path; a rank's user code must not link to the service's files."""
    path = f"{root.rstrip('/')}/{relative}"
    if isinstance(system, fs.LocalFileSystem):
        if not Path(path).resolve().is_relative_to(Path(root).resolve()):
            raise NotFoundError(
                f"{relative} is a link out of the job's storage, so it is not shown"
            )
    return path


def _without_cut_character(raw: bytes) -> bytes:
    """Leaves a UTF-8 character that is cut in half to the next part of the log."""
    # A character has at most 4 bytes, so its first byte is one of the last four.
    for back in range(1, min(4, len(raw)) + 1):
        byte = raw[-back]
        is_continuation = byte & 0xC0 == 0x80
        if is_continuation:
            continue
        if _character_length(byte) > back:
            return raw[:-back]
        break
    return raw


def _character_length(first_byte: int) -> int:
    """Returns the length of the UTF-8 character that a byte starts; 1 for a wrong byte."""
    if first_byte >> 5 == 0b110:
        return 2
    if first_byte >> 4 == 0b1110:
        return 3
    if first_byte >> 3 == 0b11110:
        return 4
    return 1
