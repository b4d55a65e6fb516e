"""Checkpoint folders with one small file instead of tensors."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_ray.checkpoint.directory import checkpoint_path, commit
from megatron_ray.storage.storage import open_storage


def write_checkpoint(
    root: Path,
    step: int,
    attempt: int,
    manifest: Mapping[str, Any] | None,
    reports: Iterable[Mapping[str, Any]] = (),
) -> str:
    """Writes a folder and returns its path; without a manifest it is not committed."""
    path = checkpoint_path(str(root), step, attempt)
    storage = open_storage(path)
    storage.write_bytes_atomic("index.json", b'{"files": {"data/rank-00000.bin": 8}}')
    storage.write_bytes_atomic("data/rank-00000.bin", b"12345678")
    if manifest is not None:
        commit(path, manifest, reports)
    return path
