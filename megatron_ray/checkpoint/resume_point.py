"""Chooses the checkpoint from which a run resumes.

Owns: the order of choice, and what is reported about checkpoints that cannot be used.
Torch-free. Must not know: tensors, how bytes are checked, what starts from the choice.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_ray.checkpoint.directory import (
    COMMITTED,
    FOLDER,
    CheckpointError,
    CheckpointInfo,
    list_checkpoints,
)
from megatron_ray.exceptions import ErrorKind


class NoWholeCheckpointError(CheckpointError):
    """A folder has committed checkpoints, and none of them can be loaded.

    The run must not begin anew without the user's consent.
    """

    failure_kind = ErrorKind.USER


class MixedRunsError(CheckpointError):
    """A folder has checkpoints of several runs, so the newest may be another run's."""

    failure_kind = ErrorKind.USER


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint, newer than the chosen one, that cannot be loaded."""

    info: CheckpointInfo
    cause: str

    def __str__(self) -> str:
        return f"{self.info.path}: {self.cause}"


@dataclass(frozen=True)
class ResumePoint:
    """The newest checkpoint that can be loaded."""

    checkpoint: CheckpointInfo | None
    """None when nothing was ever committed."""
    passed_over: tuple[PassedOver, ...] = ()
    """Newer ones, newest first."""


def find_damage_by_size(info: CheckpointInfo) -> str | None:
    """Returns what is wrong with a checkpoint as far as its listing shows it."""
    return info.damage


def choose_resume_point(
    storage_path: str,
    find_damage: Callable[[CheckpointInfo], str | None] = find_damage_by_size,
) -> ResumePoint:
    """Returns the newest committed checkpoint without damage, and what is newer.

    Those that a rollback has left behind do not count. `find_damage` is called for whole
    checkpoints, newest first, until one has none; it may read their bytes. Raises
    NoWholeCheckpointError, MixedRunsError, StorageError.
    """
    infos = list_checkpoints(storage_path)
    _require_one_run(storage_path, infos)
    passed_over: list[PassedOver] = []
    for info in reversed(infos):
        if info.is_left_behind:
            continue
        cause = info.damage
        if info.committed:
            cause = find_damage(info)
            if cause is None:
                return ResumePoint(info, tuple(passed_over))
        if info.lacks_marker:
            cause = f"its {COMMITTED} marker is missing"
        passed_over.append(PassedOver(info, cause or "its save did not finish"))
    damaged = [item for item in passed_over if item.info.was_committed]
    if damaged:
        raise NoWholeCheckpointError("resume from", storage_path, _describe(damaged))
    return ResumePoint(None, tuple(passed_over))


def _describe(damaged: list[PassedOver]) -> str:
    listed = "\n  ".join(str(item) for item in damaged)
    return (
        f"none of its committed checkpoints is whole:\n  {listed}\nrestore their files to "
        "resume; to begin at step 0, move these folders away or use another storage.path"
    )


def _require_one_run(storage_path: str, infos: list[CheckpointInfo]) -> None:
    names_by_run: dict[str, list[str]] = {}
    for info in infos:
        if info.run.id is not None:
            name = info.path.rpartition("/")[2]
            names_by_run.setdefault(info.run.id, []).append(name)
    if len(names_by_run) < 2:
        return
    rows = []
    for run, names in names_by_run.items():
        rows.append(f"run {run}: {', '.join(names)}")
    listed = "\n  ".join(rows)
    cause = (
        f"{FOLDER}/ holds checkpoints of {len(names_by_run)} runs:\n  {listed}\nmove those "
        "of all runs but one to another folder"
    )
    raise MixedRunsError("resume from", storage_path, cause)
