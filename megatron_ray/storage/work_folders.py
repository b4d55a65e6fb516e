"""Folders that appear whole.

Owns: work folders, the rename, leftovers of the dead. Must not know: what is in them.
"""

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WORK = ".tmp-"
_STALE_S = 24 * 3600.0


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A work folder to fill; on leaving it becomes `folder` in one rename, durably, or
    is removed after an error.

    When another process was first its folder stays: makers of one name do equal work. A
    killed maker leaves a folder that nothing reads and that a later maker removes once
    it is a day old. Raises OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent)
    work = folder.with_name(f"{WORK}{folder.name}-{uuid.uuid4().hex}")
    work.mkdir()
    try:
        yield work
        _publish(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, folder: Path) -> None:
    for file in work.iterdir():
        if not file.is_symlink():
            _sync(file)
    _sync(work)
    try:
        work.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    else:
        _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(parent: Path) -> None:
    for work in parent.glob(f"{WORK}*"):
        try:
            newest = max(path.stat().st_mtime for path in (work, *work.iterdir()))
        except OSError:
            continue  # its maker has just finished
        if time.time() - newest > _STALE_S:
            shutil.rmtree(work, ignore_errors=True)
