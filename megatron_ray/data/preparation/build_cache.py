"""Keeps what preparation builds, by name, in the cache folder.

Owns: reuse, completeness. Must not know: what is built.

An entry is a folder with `complete.json`, which describes it and lists the sizes of its
files. On a local disk the whole folder appears at once; in an object store, which cannot
rename, `complete.json` is uploaded last.
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
BuildEntry = Callable[[Path], Description]
"""Fills a local folder and returns the entry's description, JSON values."""


def get_or_build(cache: Location, name: str, build: BuildEntry) -> Description:
    """Returns the description of entry `name`, which is built unless it is complete.

    Raises OSError and what `build` raises.
    """
    entry = cache / name
    # Two processes may both miss it and build: that costs time, and harms nothing.
    description = read_description(entry)
    if description is not None:
        return description
    if cache.is_local:
        return _build_locally(entry, build)
    return _build_and_upload(entry, build)


def read_description(entry: Location) -> Description | None:
    """Returns the description of a complete entry.

    None when it is missing, or a file of it is missing or has another size.
    """
    try:
        description: Description = json.loads(read_bytes(entry / COMPLETE))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    for name, size in description["files"].items():
        file = file_stat(entry / name)
        if file is None or file.size != size:
            return None
    return description


def _build_locally(entry: Location, build: BuildEntry) -> Description:
    folder = Path(entry.path)
    with atomic_folder(folder) as work:
        description = _build(work, build)
        if folder.is_dir() and read_description(entry) is None:
            # A damaged entry is in the way. It goes in one rename, so that no reader
            # sees half of it, and under a name that is removed once it is stale.
            damaged = folder.with_name(f"{WORK_PREFIX}damaged-{uuid.uuid4().hex}")
            with contextlib.suppress(FileNotFoundError):
                folder.rename(damaged)
    # Another process may have published its own first, with links that differ.
    return read_description(entry) or description


def _build_and_upload(entry: Location, build: BuildEntry) -> Description:
    with tempfile.TemporaryDirectory() as work:
        description = _build(Path(work), build)
        # The file that makes the entry complete goes last.
        files = sorted(Path(work).iterdir(), key=lambda file: file.name == COMPLETE)
        for file in files:
            upload(file, entry / file.name)
    return description


def _build(work: Path, build: BuildEntry) -> Description:
    description = build(work)
    sizes = {}
    for file in sorted(work.iterdir()):
        sizes[file.name] = file.stat().st_size
    # By size a file that was cut short is found without reading it.
    description["files"] = sizes
    (work / COMPLETE).write_text(json.dumps(description, sort_keys=True))
    return description
