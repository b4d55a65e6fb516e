"""Keeps built index arrays on disk.

Owns: keys, memory mapping. Must not know: the meaning of the arrays.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ray.storage.durable import atomic_folder
from megatron_ray.storage.location import is_local_path, parse_location

Arrays = dict[str, npt.NDArray[Any]]


def cache_key(fields: Mapping[str, object]) -> str:
    """Returns the cache key of arrays that these JSON values determine."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def load_or_build(cache_dir: str | None, key: str, build: Callable[[], Arrays]) -> Arrays:
    """Returns the arrays under `key`, built when missing and then memory-mapped.

    The folder appears atomically. Ranks that build at the same time do the same work,
    and all use the first result. Without a local cache, with damaged files in it, or
    where it cannot be written, the arrays stay in memory. Raises OSError when files of
    the cache cannot be read.
    """
    # Files in an object store cannot be memory-mapped, so each rank builds its own arrays.
    if cache_dir is None or not is_local_path(cache_dir):
        return build()
    folder = Path(parse_location(cache_dir).path) / key
    if not folder.is_dir():
        arrays = build()
        # A full disk, say, is no reason to end a run.
        try:
            with atomic_folder(folder) as work:
                for name, array in arrays.items():
                    np.save(work / f"{name}.npy", array)
        except OSError:
            return arrays
    # The rank that built them maps them too, so that ranks of a node share the page cache.
    files = sorted(folder.glob("*.npy"))
    try:
        return {file.stem: np.load(file, mmap_mode="r") for file in files}
    # Damaged files are left alone, because other ranks may have them mapped.
    except (EOFError, ValueError):
        return build()
