"""Caches the results of preparation by name in the cache folder.

Owns: reuse, completeness. Must not know: the contents of entries.

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

    Raises OSError and the errors of `build`.
    """
    entry = cache / name
    # Two processes may both miss it and build it, which is harmless.
    description = read_description(entry)
    if description is not None:
        return description
    if cache.is_local:
        return _build_locally(entry, build)
    return _build_and_upload(entry, build)


def read_description(entry: Location) -> Description | None:
    """Returns the description of a complete entry.

    None when the entry or one of its files is missing, or a file has another size.
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
            # A damaged entry blocks the name. A single rename removes it, so that readers
            # never find a partial entry; the new name is deleted once it is stale.
            damaged = folder.with_name(f"{WORK_PREFIX}damaged-{uuid.uuid4().hex}")
            with contextlib.suppress(FileNotFoundError):
                folder.rename(damaged)
    # Another process may have published its entry first, with different links.
    return read_description(entry) or description


def _build_and_upload(entry: Location, build: BuildEntry) -> Description:
    with tempfile.TemporaryDirectory() as work:
        description = _build(Path(work), build)
        # The file that marks the entry as complete is uploaded last.
        files = sorted(Path(work).iterdir(), key=lambda file: file.name == COMPLETE)
        for file in files:
            upload(file, entry / file.name)
    return description


def _build(work: Path, build: BuildEntry) -> Description:
    description = build(work)
    sizes = {}
    for file in sorted(work.iterdir()):
        sizes[file.name] = file.stat().st_size
    # Sizes reveal truncated files without reading them.
    description["files"] = sizes
    (work / COMPLETE).write_text(json.dumps(description, sort_keys=True))
    return description
