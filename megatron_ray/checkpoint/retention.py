"""Deletes checkpoints that are no longer kept.

Owns: which checkpoints of a folder a run deletes. Must not know: tensors, torch, when a
checkpoint is committed.
"""

from collections.abc import Sequence

from megatron_ray.checkpoint.directory import (
    COMMITTED,
    FOLDER,
    CheckpointInfo,
    RunIdentity,
    list_checkpoints,
)
from megatron_ray.storage.storage import open_storage


def apply_retention(
    storage_path: str, keep_last: int, run: RunIdentity | None = None
) -> Sequence[str]:
    """Deletes old and unfinished checkpoints of a run and returns their paths.

    Deleted are committed ones beyond the newest `keep_last`, and those that were never
    finished before the newest. Nothing newer than the newest committed one is deleted:
    it may still be written. Checkpoints of other runs are neither counted nor deleted,
    nor those that a rollback has left behind, and damaged ones are kept, because a user
    may mend them. Raises ValueError for
    keep_last < 1, StorageError.
    """
    if keep_last < 1:
        raise ValueError(
            f"keep_last={keep_last} must be at least 1: the only committed checkpoint is "
            "never deleted"
        )
    run = run or RunIdentity()
    infos = []
    for info in list_checkpoints(storage_path):
        if run.owns(info) and not info.is_left_behind:
            infos.append(info)
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
    if info.was_committed or info.order >= newest.order:
        return False
    return info.step <= newest.step and info.attempt <= newest.attempt


def delete_checkpoint(storage_path: str, info: CheckpointInfo) -> None:
    """Deletes a checkpoint. Raises StorageError."""
    storage = open_storage(storage_path)
    folder = f"{FOLDER}/{info.path.rpartition('/')[2]}"
    # The marker first, so that a partly deleted checkpoint is not committed.
    storage.delete_file(f"{folder}/{COMMITTED}")
    storage.delete_tree(folder)
