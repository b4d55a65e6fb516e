"""Manages the checkpoint folders of a job.

Owns: their names, when one is complete, which are kept. Must not know: tensors, torch.

A checkpoint is committed once its COMMITTED marker exists, which is written last and
deleted first. manifest.json lists every file with its size, so that missing files are
detected.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ray.storage.errors import MissingFileError, StorageError
from megatron_ray.storage.storage import Storage, open_storage

FORMAT_VERSION = 1
"""Written into every checkpoint; a reader refuses higher ones."""

FOLDER = "checkpoints"
COMMITTED = "COMMITTED"
MANIFEST = "manifest.json"
REPORTS = "reports.jsonl"
INDEX = "index.json"
"""Name of the index of all boxes of all logical tensors; written by rank 0."""

_NAME = re.compile(r"step-(\d{8,})-a(\d{4,})")

FileSizes = dict[str, int]
"""Bytes of each file of a checkpoint, by its name in the folder."""


class CheckpointError(StorageError):
    """A checkpoint is incomplete, not committed, too new, or does not fit the model."""


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint folder."""

    step: int
    attempt: int
    path: str
    """Folder or URI."""
    committed: bool
    """Marker, manifest and all files of the manifest exist."""
    loss: float | None
    """Training loss at the step; None when not committed or not known."""
    bytes: int
    """Size of all files."""

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: later checkpoints compare higher."""
        return self.step, self.attempt


def checkpoint_path(storage_path: str, step: int, attempt: int) -> str:
    """Returns the folder of a checkpoint.

    The name contains the attempt, so that ranks of a replaced attempt that still run
    cannot write into a checkpoint of the next attempt.
    """
    return f"{storage_path.rstrip('/')}/{_folder(step, attempt)}"


def _folder(step: int, attempt: int) -> str:
    return f"{FOLDER}/step-{step:08d}-a{attempt:04d}"


def list_checkpoints(storage_path: str) -> list[CheckpointInfo]:
    """Returns all checkpoint folders, committed or not, oldest first.

    Raises StorageError.
    """
    storage = open_storage(storage_path)
    # One recursive listing: a request for each folder would be slow in an object store.
    files_by_folder: dict[str, FileSizes] = {}
    for entry in storage.list(FOLDER, recursive=True):
        folder, _, name = entry.name.partition("/")
        files = files_by_folder.setdefault(folder, {})
        if name and not entry.is_folder:
            files[name] = entry.size
    infos = []
    for folder, files in files_by_folder.items():
        # Other folders are not checkpoints: they are neither listed nor deleted.
        match = _NAME.fullmatch(folder)
        if match:
            step = int(match[1])
            attempt = int(match[2])
            infos.append(_checkpoint_info(storage, storage_path, step, attempt, files))
    return sorted(infos, key=lambda info: info.order)


def latest_committed(storage_path: str) -> CheckpointInfo | None:
    """Returns the newest committed checkpoint, if any. Raises StorageError."""
    for info in reversed(list_checkpoints(storage_path)):
        if info.committed:
            return info
    return None


def commit(
    path: str,
    manifest: Mapping[str, Any],
    reports: Iterable[Mapping[str, Any]],
    storage: Storage | None = None,
) -> None:
    """Commits a checkpoint: writes reports, the manifest of all files, the marker.

    All ranks must have reported that their part is durable. Committing again changes
    nothing. `storage` is the open storage of `path`, if any. Raises CheckpointError
    when the common part or a rank's part is missing.
    """
    storage = storage or open_storage(path)
    # The successor of a driver that died during a commit repeats the commit.
    if storage.exists(COMMITTED):
        return
    _check_parts(storage, path)
    lines = [json.dumps(dict(report)).encode() + b"\n" for report in reports]
    storage.write_bytes_atomic(REPORTS, b"".join(lines))
    files = _file_sizes(storage)
    # An interrupted commit may have left a manifest, which must not list itself.
    files.pop(MANIFEST, None)
    body = {**manifest, "format_version": FORMAT_VERSION, "files": files}
    storage.write_bytes_atomic(MANIFEST, json.dumps(body, indent=2).encode())
    # From here on the checkpoint is committed.
    storage.write_bytes_atomic(COMMITTED, b"")


def read_reports(path: str) -> list[bytes]:
    """Returns the step reports of a committed checkpoint, a JSON object each.

    None when the checkpoint has been deleted meanwhile. Raises StorageError.
    """
    try:
        return open_storage(path).read_bytes(REPORTS).splitlines()
    except MissingFileError:
        return []


def _check_parts(storage: Storage, path: str) -> None:
    """Checks that every rank's file exists with the planned size."""
    try:
        index = json.loads(storage.read_bytes(INDEX))
    except MissingFileError as error:
        cause = f"{INDEX} is missing, rank 0 has not written its part"
        raise CheckpointError("commit", path, cause) from error
    damage = _find_damage(index, _file_sizes(storage))
    if damage is not None:
        raise CheckpointError("commit", path, damage)


def read_manifest(path: str) -> dict[str, Any]:
    """Returns the manifest of a committed, complete checkpoint.

    Raises CheckpointError when it is not committed, has lost a file, or was written by
    a newer version.
    """
    storage = open_storage(path)
    if not storage.exists(COMMITTED):
        cause = (
            "it is not committed (no COMMITTED marker): the save did not finish, use an "
            "older checkpoint"
        )
        # A wrong path is a more common error, with a different remedy.
        if not storage.list():
            cause = "there is no checkpoint at this path"
        raise CheckpointError("load", path, cause)
    manifest = _read_manifest_file(storage, MANIFEST)
    if manifest is None:
        raise CheckpointError("load", path, f"{MANIFEST} is missing or not readable")
    check_format_version(path, manifest)
    damage = _find_damage(manifest, _file_sizes(storage))
    if damage is not None:
        raise CheckpointError("load", path, damage)
    return manifest


def check_format_version(path: str, values: Mapping[str, Any]) -> None:
    """Raises CheckpointError when `values` were written by a newer version."""
    # A reader supports every version up to its own.
    version = values.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        cause = (
            f"its format_version is {version}, this program reads up to {FORMAT_VERSION}; "
            "use the newer program"
        )
        raise CheckpointError("load", path, cause)


def apply_retention(storage_path: str, keep_last: int) -> Sequence[str]:
    """Deletes old and unfinished checkpoints and returns their paths.

    Deleted are committed ones beyond the newest `keep_last`, and those that were never
    finished before the newest. Nothing newer than the newest committed one is deleted:
    it may still be written. Raises ValueError for keep_last < 1, StorageError.
    """
    if keep_last < 1:
        raise ValueError(
            f"keep_last={keep_last} must be at least 1: the only committed checkpoint is "
            "never deleted"
        )
    infos = list_checkpoints(storage_path)
    committed = [info for info in infos if info.committed]
    if not committed:
        return []
    newest = committed[-1]
    # Sorted oldest first, so the last `keep_last` are the newest.
    expired = committed[:-keep_last]
    for info in infos:
        if _is_abandoned(info, newest):
            expired.append(info)
    for info in expired:
        delete_checkpoint(storage_path, info)
    return [info.path for info in expired]


def _is_abandoned(info: CheckpointInfo, newest: CheckpointInfo) -> bool:
    """Returns whether an unfinished checkpoint can no longer be committed.

    Both step and attempt are compared: a later attempt may be writing an earlier step.
    """
    if info.committed or info.order >= newest.order:
        return False
    return info.step <= newest.step and info.attempt <= newest.attempt


def delete_checkpoint(storage_path: str, info: CheckpointInfo) -> None:
    """Deletes a checkpoint. Raises StorageError."""
    storage = open_storage(storage_path)
    folder = f"{FOLDER}/{info.path.rpartition('/')[2]}"
    # The marker first, so that a partly deleted checkpoint is not committed.
    storage.delete_file(f"{folder}/{COMMITTED}")
    storage.delete_tree(folder)


def _checkpoint_info(
    storage: Storage, storage_path: str, step: int, attempt: int, files: FileSizes
) -> CheckpointInfo:
    manifest = None
    # Without the marker no manifest is read, which saves a request.
    if COMMITTED in files:
        name = f"{_folder(step, attempt)}/{MANIFEST}"
        manifest = _read_manifest_file(storage, name)
    # The listing contains all sizes, so only the manifest is read.
    is_complete = manifest is not None and _find_damage(manifest, files) is None
    loss = None
    if manifest is not None and is_complete:
        loss = manifest.get("loss")
    return CheckpointInfo(
        step=step,
        attempt=attempt,
        path=checkpoint_path(storage_path, step, attempt),
        committed=is_complete,
        loss=loss,
        bytes=sum(files.values()),
    )


def _read_manifest_file(storage: Storage, name: str) -> dict[str, Any] | None:
    """Returns None when the file is missing or not a manifest."""
    try:
        manifest = json.loads(storage.read_bytes(name))
    except (MissingFileError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
        return manifest
    return None


def _file_sizes(storage: Storage) -> FileSizes:
    sizes = {}
    for entry in storage.list(recursive=True):
        if not entry.is_folder:
            sizes[entry.name] = entry.size
    return sizes


def _find_damage(manifest: Mapping[str, Any], files: FileSizes) -> str | None:
    """Returns a message about missing or truncated files of a manifest, if any."""
    for name, size in manifest["files"].items():
        if name not in files:
            return f"its file {name} is missing"
        if files[name] != size:
            return f"its file {name} has {files[name]} bytes, {size} were written"
    return None
