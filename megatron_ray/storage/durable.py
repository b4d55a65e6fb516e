"""Writes local files and folders atomically and durably.

Owns: temporary names, fsync, the rename. Must not know: the contents.

Both writers follow the same order: write under a temporary name, fsync the content,
rename, fsync the folder above. The rename makes the file visible, so it must come after
the content is on disk; the fsync of the folder makes the rename itself durable.
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
    # In the same folder, since a rename is atomic only within one filesystem; with a random
    # part, since a replaced process may still write the same file.
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

    If another process was first, its folder is kept, as all writers of a name write the
    same content. A killed process leaves an unused work folder, which a later call
    removes once it is a day old. Raises OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A running build modifies a file at least once a day.
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
        # A link's target belongs to others, and fsync may not be allowed there.
        if not file.is_symlink():
            fsync_path(file)
    fsync_path(work)
    try:
        work.rename(folder)
    except OSError:
        # A rename onto a non-empty folder fails: another process has published it first.
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
