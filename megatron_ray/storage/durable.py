"""Writes local files and folders that appear whole and survive a power cut.

Owns: temporary names, fsync, the rename. Must not know: what is written.

Both writers follow the same order: write under a temporary name, fsync the content,
rename, fsync the folder above. The rename is what makes it visible, so it must come after
the content is on disk; the fsync of the folder makes the rename itself survive.
"""

import os
import secrets
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

PARTIAL_SUFFIX = ".partial"
WORK_PREFIX = ".tmp-"
_STALE_S = 24 * 3600.0


@contextmanager
def atomic_file(path: Path) -> Iterator[FileIO]:
    """Yields an unbuffered file that becomes `path`, durably, at a normal exit.

    After an error `path` is as it was. Makes parent folders. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its target, since a rename is atomic only within one filesystem; a random
    # part, since a process that was replaced may still be writing the same file.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        with open(partial, "wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a work folder that becomes `folder`, durably, at a normal exit.

    When another process was first, its folder stays: those that write the same name write
    the same content. A killed process leaves a work folder that nothing reads; a later
    call removes it once it is a day old. Raises OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # No build that is alive leaves all its files untouched for a day.
    _remove_stale(folder.parent)
    work = folder.with_name(f"{WORK_PREFIX}{folder.name}-{uuid.uuid4().hex}")
    work.mkdir()
    try:
        yield work
        _publish(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Flushes a file, or a folder's renames and unlinks, to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(work: Path, folder: Path) -> None:
    for file in work.iterdir():
        # A link's target is not ours, and may lie where fsync is not allowed.
        if not file.is_symlink():
            fsync_path(file)
    fsync_path(work)
    try:
        work.rename(folder)
    except OSError:
        # A rename onto a filled folder fails: another process has published it first.
        if not folder.is_dir():
            raise
    else:
        fsync_path(folder.parent)


def _remove_stale(parent: Path) -> None:
    for work in parent.glob(f"{WORK_PREFIX}*"):
        try:
            newest = work.stat().st_mtime
            for path in work.iterdir():
                newest = max(newest, path.stat().st_mtime)
        except OSError:
            continue  # it has just been renamed or removed by its own process
        if time.time() - newest > _STALE_S:
            shutil.rmtree(work, ignore_errors=True)
