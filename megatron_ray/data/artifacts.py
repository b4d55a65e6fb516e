"""Finished work under the cache folder.

Owns: reuse, completeness. Must not know: what is made.

An artifact is a folder with `complete.json`, which describes it and lists its files'
sizes. Locally the whole folder appears at once (`atomic_folder`); in an object store,
which cannot rename, `complete.json` is uploaded last.
"""

import contextlib
import json
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ray.storage.durable import WORK_PREFIX, atomic_folder
from megatron_ray.storage.files import file_stat, read_bytes, upload
from megatron_ray.storage.location import Location

COMPLETE = "complete.json"

Description = dict[str, Any]


def produce(cache: Location, name: str, make: Callable[[Path], Description]) -> Description:
    """The description of artifact `name`, made by `make(work folder)` unless complete.

    Raises OSError and what `make` raises.
    """
    target = cache / name
    found = complete(target)
    if found is not None:
        return found
    if not cache.is_local:
        with tempfile.TemporaryDirectory() as work:
            description = _made(Path(work), make)
            for file in sorted(
                Path(work).iterdir(), key=lambda file: file.name == COMPLETE
            ):
                upload(file, target / file.name)
        return description
    folder = Path(target.path)
    with atomic_folder(folder) as work_folder:
        description = _made(work_folder, make)
        if folder.is_dir() and complete(target) is None:
            # Somebody has damaged it; out of the way in one rename, so that no reader
            # sees half of it go.
            with contextlib.suppress(FileNotFoundError):
                folder.rename(folder.with_name(f"{WORK_PREFIX}damaged-{uuid.uuid4().hex}"))
    return complete(target) or description


def complete(target: Location) -> Description | None:
    """The description of a complete artifact; None when it is missing or a file of it
    is missing or has another size.
    """
    try:
        description: Description = json.loads(read_bytes(target / COMPLETE))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    for name, size in description["files"].items():
        found = file_stat(target / name)
        if found is None or found.size != size:
            return None
    return description


def _made(work: Path, make: Callable[[Path], Description]) -> Description:
    description = make(work)
    description["files"] = {
        file.name: file.stat().st_size for file in sorted(work.iterdir())
    }
    (work / COMPLETE).write_text(json.dumps(description, sort_keys=True))
    return description
