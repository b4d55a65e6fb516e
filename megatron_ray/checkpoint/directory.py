"""Manages the checkpoint folders of a job.

Owns: their names, when one is complete or damaged, which run has written it. Must not
know: tensors, torch.

A checkpoint is committed once its COMMITTED marker exists, which is written last and
deleted first. manifest.json lists every file with its size, so that missing files are
detected. Only files that loading needs count: all others, such as a job spec, are meant
for people, who may edit them.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from megatron_ray.checkpoint.records.rollbacks import (
    FILE,
    Rollback,
    is_left_behind,
    read_rollbacks,
    with_rollback,
    write_rollbacks,
)
from megatron_ray.exceptions import ErrorKind
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
_NEEDED_FILES = (INDEX, "train_state.json", "tokenizer.json")
_NEEDED_FOLDERS = ("data/", "train_state/", "digests/")
_NO_MANIFEST = f"{MANIFEST} is missing or not readable"

FileSizes = dict[str, int]
"""Bytes of each file of a checkpoint, by its name in the folder."""


class CheckpointError(StorageError):
    """A checkpoint is incomplete, not committed, too new, or does not fit the model."""


class DamagedCheckpointError(CheckpointError):
    """A committed checkpoint lacks files, or has other bytes than were written.

    A retry needs another checkpoint.
    """

    failure_kind = ErrorKind.CHECKPOINT


@dataclass(frozen=True)
class RunIdentity:
    """The run that writes checkpoints into a folder, and which of them are its own."""

    id: str | None = None
    """Stored in every manifest; None in checkpoints of earlier versions, and for a run
    that continues from one of these."""
    first_attempt: int = 1
    """Attempts of the run have this number or a higher one."""
    owns_unnamed: bool = False
    """Whether checkpoints without an id are its own too, because no other run ever
    wrote to the folder."""
    damaged: tuple[str, ...] = ()
    """Names of checkpoints with damaged bytes, which a listing does not show. They are
    never deleted, because a user may restore them."""

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> Self:
        """Returns the run that a manifest names."""
        return cls(
            manifest.get("run"),
            manifest.get("first_attempt", 1),
            manifest.get("owns_unnamed", False),
            tuple(manifest.get("damaged", ())),
        )

    def to_manifest(self) -> dict[str, Any]:
        """Returns the fields of a manifest that name the run."""
        fields: dict[str, Any] = {}
        if self.id is not None:
            fields = {"run": self.id, "first_attempt": self.first_attempt}
        if self.owns_unnamed:
            fields["owns_unnamed"] = True
        if self.damaged:
            fields["damaged"] = list(self.damaged)
        return fields

    def owns(self, info: "CheckpointInfo") -> bool:
        """Returns whether the run has written a checkpoint, and may delete it."""
        if info.name in self.damaged:
            return False
        # An unfinished one has no manifest, but its name contains the attempt.
        if not info.was_committed:
            return info.attempt >= self.first_attempt
        return info.run.id == self.id or (info.run.id is None and self.owns_unnamed)


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint folder."""

    step: int
    attempt: int
    path: str
    """Folder or URI."""
    committed: bool
    """The marker, the manifest and all files exist that loading needs."""
    damage: str | None
    """What is wrong with one that was committed; None for whole and unfinished ones."""
    lacks_marker: bool
    """All files exist that loading needs, and only the marker is missing."""
    run: RunIdentity
    """The run that has written it, as far as the manifest names it."""
    loss: float | None
    """Training loss at the step; None when not committed or not known."""
    bytes: int
    """Size of all files."""
    is_left_behind: bool = False
    """Whether the run was rolled back to before it, so that no run resumes from it."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.rpartition("/")[2]

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: later checkpoints compare higher."""
        return self.step, self.attempt

    @property
    def was_committed(self) -> bool:
        """Whether it was committed, whatever has happened to it since."""
        return self.committed or self.damage is not None


def checkpoint_path(storage_path: str, step: int, attempt: int) -> str:
    """Returns the folder of a checkpoint.

    The name contains the attempt, so that ranks of a replaced attempt that still run
    cannot write into a checkpoint of the next attempt.
    """
    return f"{storage_path.rstrip('/')}/{_folder(step, attempt)}"


def _folder(step: int, attempt: int) -> str:
    return f"{FOLDER}/step-{step:08d}-a{attempt:04d}"


def attempt_of(path: str) -> int:
    """Returns the attempt in the name of a checkpoint's folder.

    Raises ValueError for another folder.
    """
    match = _NAME.fullmatch(path.rpartition("/")[2])
    if match is None:
        raise ValueError(f"{path} is no checkpoint of a run")
    return int(match[2])


def list_checkpoints(storage_path: str) -> list[CheckpointInfo]:
    """Returns all checkpoint folders, committed or not, oldest first.

    Raises StorageError.
    """
    storage = open_storage(storage_path)
    # One recursive listing: a request for each folder would be slow in an object store.
    files_by_folder: dict[str, FileSizes] = {}
    rollbacks: tuple[Rollback, ...] = ()
    for entry in storage.list(FOLDER, recursive=True):
        if entry.name == FILE:
            rollbacks = _read_rollbacks(storage_path)
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
            info = _checkpoint_info(storage, storage_path, step, attempt, files)
            is_behind = is_left_behind(rollbacks, attempt, step)
            infos.append(replace(info, is_left_behind=is_behind))
    return sorted(infos, key=lambda info: info.order)


def latest_committed(storage_path: str) -> CheckpointInfo | None:
    """Returns the newest committed checkpoint that has all its files, if any.

    `resume_point` chooses the one to resume from. Raises StorageError.
    """
    for info in reversed(list_checkpoints(storage_path)):
        if info.committed and not info.is_left_behind:
            return info
    return None


def rollbacks_of(storage_path: str) -> tuple[Rollback, ...]:
    """Returns the rollbacks of a run. Raises StorageError."""
    names = [entry.name for entry in open_storage(storage_path).list(FOLDER)]
    if FILE not in names:
        return ()
    return _read_rollbacks(storage_path)


def record_rollback(storage_path: str, rollback: Rollback) -> None:
    """Leaves states of a run behind, durably; again for an attempt changes nothing.

    Raises StorageError.
    """
    rollbacks = with_rollback(rollbacks_of(storage_path), rollback)
    write_rollbacks(open_storage(storage_path), FOLDER, rollbacks)


def forget_rollbacks(storage_path: str) -> None:
    """Deletes the record of an earlier run in the folder. Raises StorageError."""
    if rollbacks_of(storage_path):
        open_storage(storage_path).delete_file(f"{FOLDER}/{FILE}")


def _read_rollbacks(storage_path: str) -> tuple[Rollback, ...]:
    try:
        return read_rollbacks(open_storage(storage_path), FOLDER)
    except (KeyError, TypeError, ValueError) as error:
        cause = f"{FOLDER}/{FILE} is not readable: {error}"
        raise CheckpointError("read", storage_path, cause) from error


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


def finish_commit(path: str) -> None:
    """Writes the marker of a checkpoint that only lacks it. Raises StorageError."""
    open_storage(path).write_bytes_atomic(COMMITTED, b"")


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
    damage = _find_damage(index["files"], _file_sizes(storage))
    if damage is not None:
        raise CheckpointError("commit", path, damage)


def read_manifest(path: str) -> dict[str, Any]:
    """Returns the manifest of a committed, complete checkpoint.

    Raises CheckpointError when it is not committed or was written by a newer version,
    DamagedCheckpointError when it has lost a file.
    """
    manifest = read_committed_manifest(path)
    for _, cause in damaged_files(path, manifest):
        raise DamagedCheckpointError("load", path, cause)
    return manifest


def read_committed_manifest(path: str) -> dict[str, Any]:
    """Returns the manifest of a committed checkpoint, whose files may be damaged.

    Raises CheckpointError when it is not committed or was written by a newer version,
    DamagedCheckpointError when it has lost the manifest.
    """
    storage = open_storage(path)
    if not storage.exists(COMMITTED):
        cause = contained_checkpoint(path)
        if cause is None:
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
        raise DamagedCheckpointError("load", path, _NO_MANIFEST)
    check_format_version(path, manifest)
    return manifest


def damaged_files(path: str, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the files that are missing or have another size, each with what is wrong.

    Raises StorageError.
    """
    return list(_damaged(_needed_files(manifest), _file_sizes(open_storage(path))))


def contained_checkpoint(path: str) -> str | None:
    """Returns a sentence that names the newest checkpoint in a run's folder, if it is one.

    A run's folder is a common mistake where one of its checkpoints is needed.
    """
    run, _, name = path.rstrip("/").rpartition("/")
    if name != FOLDER:
        run = path
    newest = latest_committed(run or ".")
    if newest is None:
        return None
    return f"it is the folder of a run, whose newest checkpoint is {newest.path}: give that"


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


def _checkpoint_info(
    storage: Storage, storage_path: str, step: int, attempt: int, files: FileSizes
) -> CheckpointInfo:
    manifest = None
    # A save that has not come to its commit has no manifest, which saves a request.
    if MANIFEST in files:
        manifest = _read_manifest_file(storage, f"{_folder(step, attempt)}/{MANIFEST}")
    damage: str | None = _NO_MANIFEST
    if manifest is not None:
        # The listing contains all sizes, so only the manifest is read.
        damage = _find_damage(_needed_files(manifest), files)
    has_marker = COMMITTED in files
    is_complete = has_marker and damage is None
    facts = manifest or {}
    loss = None
    if is_complete:
        loss = facts.get("loss")
    return CheckpointInfo(
        step=step,
        attempt=attempt,
        path=checkpoint_path(storage_path, step, attempt),
        committed=is_complete,
        damage=damage if has_marker else None,
        lacks_marker=damage is None and not has_marker,
        run=RunIdentity.of_manifest(facts),
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


def _find_damage(expected: Mapping[str, int], files: FileSizes) -> str | None:
    """Returns a message about missing or truncated files, if any."""
    for _, cause in _damaged(expected, files):
        return cause
    return None


def _damaged(expected: Mapping[str, int], files: FileSizes) -> Iterator[tuple[str, str]]:
    for name, size in expected.items():
        if name not in files:
            yield name, f"its file {name} is missing"
        elif files[name] != size:
            yield name, f"its file {name} has {files[name]} bytes, {size} were written"


def _needed_files(manifest: Mapping[str, Any]) -> FileSizes:
    # Earlier versions, too, list all files in it.
    return {name: size for name, size in manifest["files"].items() if is_needed(name)}


def is_needed(name: str) -> bool:
    """Returns whether loading a checkpoint needs its file of that name."""
    return name in _NEEDED_FILES or name.startswith(_NEEDED_FOLDERS)
