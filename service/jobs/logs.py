"""Files a job has written, read back.

Owns: where logs lie under job_dir. Must not know: HTTP, the database.
"""

from pathlib import Path
from typing import Any

from pyarrow import fs

from service.http.errors import ProblemError


def log_path(attempt: int, rank: int) -> str:
    """A rank's log, relative to job_dir; made of numbers only, so it cannot lead
    anywhere else.
    """
    return f"logs/attempt-{attempt:04d}/rank-{rank:05d}.log"


def read_log(
    job_dir: str, attempt: int, rank: int, offset: int, limit: int
) -> tuple[int, str, int]:
    """(bytes in the file, text from `offset`, offset after it); a file that is not
    there yet is empty.

    Raises ProblemError unavailable when the storage does not answer.
    """
    try:
        system, root = fs.FileSystem.from_uri(job_dir)
        path = _inside(system, root, log_path(attempt, rank))
        info = system.get_file_info(path)
        if info.type != fs.FileType.File:
            return 0, "", offset
        size = int(info.size or 0)
        if offset >= size:
            return size, "", offset
        with system.open_input_file(path) as file:
            file.seek(offset)
            raw: bytes = file.read(min(limit, size - offset))
    except (OSError, ValueError) as error:
        raise ProblemError(
            "unavailable",
            f"the job's storage {job_dir} does not answer: {error}; check that the service "
            "can reach it",
        ) from error
    text, used = _decode(raw, at_end=offset + len(raw) >= size)
    return size, text, offset + used


def _inside(system: Any, root: str, relative: str) -> str:
    """The file's path; a link that leads out of the folder is not followed."""
    path = f"{root.rstrip('/')}/{relative}"
    if isinstance(system, fs.LocalFileSystem) and not Path(path).resolve().is_relative_to(
        Path(root).resolve()
    ):
        raise ProblemError(
            "not_found", f"{relative} leads out of the job's storage, so it is not shown"
        )
    return path


def _decode(raw: bytes, *, at_end: bool) -> tuple[str, int]:
    """Text and how many bytes of it were used: a character cut in half is left for the
    next piece.
    """
    if not at_end:
        for back in range(1, min(4, len(raw)) + 1):
            byte = raw[-back]
            if byte & 0xC0 != 0x80:  # start of the last character
                needed = (
                    1
                    if byte < 0x80
                    else 2
                    if byte >> 5 == 0b110
                    else 3
                    if byte >> 4 == 0b1110
                    else 4
                    if byte >> 3 == 0b11110
                    else 1
                )
                raw = raw[:-back] if needed > back else raw
                break
    return raw.decode("utf-8", errors="replace"), len(raw)
