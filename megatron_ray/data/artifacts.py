"""Finished work under the cache folder. Owns: all-or-nothing appearance, reuse, leftovers. Must not know: what is made.

An artifact is a folder with `complete.json`, which describes it and lists its files' sizes. Locally the whole folder appears in
one rename; in an object store, where there is none, `complete.json` is uploaded last. A killed maker leaves only a work folder
with a dot in front, which nothing reads and a later maker removes. Makers of one name do equal work, so either may win.
"""

import contextlib
import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ray.data.files import Place, read_bytes, stat, upload
from megatron_ray.data.index_cache import publish

COMPLETE = "complete.json"
_STALE_S = 24 * 3600.0

Description = dict[str, Any]


def produce(cache: Place, name: str, make: Callable[[Path], Description]) -> Description:
    """The description of artifact `name`, made by `make(work folder)` unless complete. Raises OSError and what `make` raises."""
    target = cache / name
    found = complete(target)
    if found is not None:
        return found
    if not cache.local:
        with tempfile.TemporaryDirectory() as work:
            description = _made(Path(work), make)
            for file in sorted(Path(work).iterdir(), key=lambda file: file.name == COMPLETE):
                upload(file, target / file.name)
        return description
    folder = Path(target.path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent)
    work_folder = folder.with_name(f".tmp-{folder.name}-{uuid.uuid4().hex}")
    work_folder.mkdir()
    try:
        description = _made(work_folder, make)
        if folder.is_dir() and complete(target) is None:
            # Somebody has damaged it; out of the way in one rename, so that no reader sees half of it go.
            with contextlib.suppress(FileNotFoundError):
                folder.rename(folder.with_name(f".tmp-damaged-{uuid.uuid4().hex}"))
        publish(work_folder, folder)
    finally:
        shutil.rmtree(work_folder, ignore_errors=True)
    return complete(target) or description


def complete(target: Place) -> Description | None:
    """The description of a complete artifact; None when it is missing or a file of it is missing or has another size."""
    try:
        description: Description = json.loads(read_bytes(target / COMPLETE))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    for name, size in description["files"].items():
        found = stat(target / name)
        if found is None or found.size != size:
            return None
    return description


def _made(work: Path, make: Callable[[Path], Description]) -> Description:
    description = make(work)
    description["files"] = {file.name: file.stat().st_size for file in sorted(work.iterdir())}
    (work / COMPLETE).write_text(json.dumps(description, sort_keys=True))
    return description


def _remove_stale(folder: Path) -> None:
    """Removes work folders of makers that died: nothing written for a day."""
    for work in folder.glob(".tmp-*"):
        try:
            newest = max(path.stat().st_mtime for path in (work, *work.iterdir()))
        except OSError:
            continue  # its maker has just finished
        if time.time() - newest > _STALE_S:
            shutil.rmtree(work, ignore_errors=True)
