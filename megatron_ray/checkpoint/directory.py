"""Checkpoints of a job as folders.

Owns: their names, what makes one count, which are kept. Must not know: tensors, torch.

A checkpoint counts once its COMMITTED marker is there, which is written last and
deleted first; manifest.json lists every file with its size, so that a folder that lost
one is recognised.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ray.storage.storage import (
    MissingFileError,
    Storage,
    StorageError,
    open_storage,
)

FORMAT_VERSION = 1
"""Written into every checkpoint; a reader refuses higher ones."""

FOLDER = "checkpoints"
COMMITTED = "COMMITTED"
MANIFEST = "manifest.json"
REPORTS = "reports.jsonl"
INDEX = "index.json"
"""Where each box of each logical tensor lies; written by rank 0 with its part."""

_NAME = re.compile(r"step-(\d{8,})-a(\d{4,})")


class CheckpointError(StorageError):
    """A checkpoint is not whole, not committed, too new, or does not fit what is to be
    loaded.
    """


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint folder."""

    step: int
    attempt: int
    path: str
    """Folder or URI."""
    committed: bool
    """Marker, manifest and all files in it are there."""
    loss: float | None
    """Training loss at the step; None when not committed or not known."""
    bytes: int
    """Size of all files."""

    @property
    def order(self) -> tuple[int, int]:
        """Later checkpoints compare higher."""
        return self.step, self.attempt


def checkpoint_path(storage_path: str, step: int, attempt: int) -> str:
    """Folder of a checkpoint; the attempt is in the name, so that a fenced-off attempt
    cannot touch a later one's.
    """
    return f"{storage_path.rstrip('/')}/{FOLDER}/step-{step:08d}-a{attempt:04d}"


def list_checkpoints(storage_path: str) -> list[CheckpointInfo]:
    """All checkpoint folders, committed or not, oldest first. Raises StorageError."""
    storage = open_storage(storage_path)
    folders: dict[str, dict[str, int]] = {}
    for entry in storage.list(FOLDER, recursive=True):
        folder, _, name = entry.name.partition("/")
        files = folders.setdefault(folder, {})
        if name and not entry.is_folder:
            files[name] = entry.size
    matches = ((_NAME.fullmatch(folder), files) for folder, files in folders.items())
    found = [
        _info(storage, storage_path, int(match[1]), int(match[2]), files)
        for match, files in matches
        if match
    ]
    return sorted(found, key=lambda info: info.order)


def latest_committed(storage_path: str) -> CheckpointInfo | None:
    """The newest whole checkpoint; torn ones do not count. Raises StorageError."""
    return next(
        (info for info in reversed(list_checkpoints(storage_path)) if info.committed), None
    )


def commit(
    path: str,
    manifest: Mapping[str, Any],
    reports: Iterable[Mapping[str, Any]],
    storage: Storage | None = None,
) -> None:
    """Makes a checkpoint count: reports, then the manifest with all files, then the
    marker.

    Committing again changes nothing.

    All ranks must have said that their part is durable. `storage` is that of `path`, when
    it is open already. Raises CheckpointError when the common part or a rank's part is
    missing.
    """
    storage = storage or open_storage(path)
    if storage.exists(COMMITTED):
        return
    _check_parts(storage, path)
    storage.write_bytes_atomic(
        REPORTS, b"".join(json.dumps(dict(report)).encode() + b"\n" for report in reports)
    )
    files = {
        entry.name: entry.size
        for entry in storage.list(recursive=True)
        if not entry.is_folder and entry.name != MANIFEST
    }
    body = {**manifest, "format_version": FORMAT_VERSION, "files": files}
    storage.write_bytes_atomic(MANIFEST, json.dumps(body, indent=2).encode())
    storage.write_bytes_atomic(COMMITTED, b"")


def read_reports(path: str) -> list[bytes]:
    """The reports that a committed checkpoint contains, a JSON object each.

    Raises StorageError.
    """
    try:
        return open_storage(path).read_bytes(REPORTS).splitlines()
    except MissingFileError:  # deleted meanwhile
        return []


def _check_parts(storage: Storage, path: str) -> None:
    """Whether every rank's file is there with the size that was planned."""
    try:
        index = json.loads(storage.read_bytes(INDEX))
    except MissingFileError as error:
        raise CheckpointError(
            "commit", path, f"{INDEX} is missing, rank 0 has not written its part"
        ) from error
    if damage := _damage(
        index, {entry.name: entry.size for entry in storage.list(recursive=True)}
    ):
        raise CheckpointError("commit", path, damage)


def read_manifest(path: str) -> dict[str, Any]:
    """Manifest of a checkpoint that may be loaded.

    Raises CheckpointError when it is not committed, has lost a file, or was written by
    a newer version.
    """
    storage = open_storage(path)
    if not storage.exists(COMMITTED):
        if not storage.list():
            raise CheckpointError("load", path, "there is no checkpoint at this path")
        raise CheckpointError(
            "load",
            path,
            "it is not committed (no COMMITTED marker): the save did not finish, use an "
            "older checkpoint",
        )
    manifest = _manifest(storage, "")
    if manifest is None:
        raise CheckpointError("load", path, f"{MANIFEST} is missing or not readable")
    check_format_version(path, manifest)
    damage = _damage(
        manifest, {entry.name: entry.size for entry in storage.list(recursive=True)}
    )
    if damage:
        raise CheckpointError("load", path, damage)
    return manifest


def check_format_version(path: str, values: Mapping[str, Any]) -> None:
    """Raises CheckpointError when `values` come from a newer program."""
    version = values.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            "load",
            path,
            f"its format_version is {version}, this program reads up to {FORMAT_VERSION}; "
            "use the newer program",
        )


def apply_retention(storage_path: str, keep_last: int) -> Sequence[str]:
    """Deletes committed checkpoints beyond the newest `keep_last` and what was never
    finished before the newest; returns paths.

    Nothing newer than the newest committed one is touched: it may be in the making.
    Raises ValueError for keep_last < 1.
    """
    if keep_last < 1:
        raise ValueError(
            f"keep_last={keep_last} must be at least 1: the only committed checkpoint is "
            "never deleted"
        )
    found = list_checkpoints(storage_path)
    committed = [info for info in found if info.committed]
    if not committed:
        return []
    newest = committed[-1]
    unfinished = [
        info
        for info in found
        if not info.committed
        and info.step <= newest.step
        and info.attempt <= newest.attempt
    ]
    doomed = committed[:-keep_last] + [
        info for info in unfinished if info.order < newest.order
    ]
    for info in doomed:
        delete_checkpoint(storage_path, info)
    return [info.path for info in doomed]


def delete_checkpoint(storage_path: str, info: CheckpointInfo) -> None:
    """Deletes the marker and then the rest, so that a half-deleted checkpoint never
    looks whole.
    """
    storage = open_storage(storage_path)
    folder = f"{FOLDER}/{info.path.rpartition('/')[2]}"
    storage.delete_file(f"{folder}/{COMMITTED}")
    storage.delete_tree(folder)


def _info(
    storage: Storage, storage_path: str, step: int, attempt: int, files: dict[str, int]
) -> CheckpointInfo:
    path = checkpoint_path(storage_path, step, attempt)
    manifest = (
        _manifest(storage, f"{FOLDER}/{path.rpartition('/')[2]}/")
        if COMMITTED in files
        else None
    )
    whole = manifest is not None and not _damage(manifest, files)
    loss = manifest.get("loss") if manifest is not None and whole else None
    return CheckpointInfo(step, attempt, path, whole, loss, sum(files.values()))


def _manifest(storage: Storage, folder: str) -> dict[str, Any] | None:
    """None when it is missing or no manifest."""
    try:
        manifest = json.loads(storage.read_bytes(folder + MANIFEST))
    except (MissingFileError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return (
        manifest
        if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)
        else None
    )


def _damage(manifest: Mapping[str, Any], files: Mapping[str, int]) -> str | None:
    """What of the manifest is not there."""
    for name, size in manifest["files"].items():
        if name not in files:
            return f"its file {name} is missing"
        if files[name] != size:
            return f"its file {name} has {files[name]} bytes, {size} were written"
    return None
