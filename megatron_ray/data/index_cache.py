"""Built index arrays on disk. Owns: atomic appearance, memory mapping. Must not know: what the arrays mean."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ray.data.files import is_local, place

Arrays = dict[str, npt.NDArray[Any]]


def cache_key(fields: Mapping[str, object]) -> str:
    """Name for what these JSON values determine."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def load_or_build(cache_dir: str | None, key: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays under `key`, built when missing and then memory-mapped.

    A folder appears under its name in one rename, so a reader sees all of it or nothing. Ranks that build at the same time do equal
    work; the first rename wins and the others use it. Without a local cache the arrays stay in memory. Raises OSError.
    """
    if cache_dir is None or not is_local(cache_dir):
        return build()
    folder = Path(place(cache_dir).path) / key
    if not folder.is_dir():
        _save(folder, build())
    return {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}


def publish(work: Path, folder: Path) -> None:
    """Moves a finished work folder to its name, durably; when another process was first, its equal folder stays. Raises OSError."""
    for file in work.iterdir():
        if not file.is_symlink():
            _sync(file)
    _sync(work)
    try:
        work.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(work, ignore_errors=True)
        return
    _sync(folder.parent)


def _save(folder: Path, arrays: Arrays) -> None:
    work = folder.parent / f".tmp-{folder.name}-{uuid.uuid4().hex}"
    work.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            np.save(work / f"{name}.npy", array)
        publish(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
