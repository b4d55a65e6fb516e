"""Checks all bytes of a checkpoint, and lists everything that is damaged.

Torch-free. Must not know: what reads the checkpoint.
"""

import json
from contextlib import suppress
from dataclasses import dataclass

from megatron_ray.checkpoint.directory import (
    INDEX,
    DamagedCheckpointError,
    damaged_files,
    is_needed,
    read_committed_manifest,
)
from megatron_ray.checkpoint.integrity.digests import (
    FOLDER,
    CheckedFiles,
    digests_file,
)
from megatron_ray.storage.errors import MissingFileError, StorageError
from megatron_ray.storage.storage import open_storage


@dataclass(frozen=True)
class Verification:
    """What the bytes of a checkpoint are like."""

    path: str
    files: int
    """Files that loading needs."""
    bytes: int
    """Bytes of these."""
    damage: tuple[str, ...]
    """A line for each missing file, file of another size, and block of other bytes."""
    unchecked: tuple[str, ...]
    """Files without digests, of which only the sizes are known."""


def verify_checkpoint(path: str) -> Verification:
    """Reads a committed checkpoint and compares all of its bytes with their digests.

    Raises CheckpointError when it is not committed or was written by a newer version,
    DamagedCheckpointError when it has lost its manifest, StorageError.
    """
    manifest = read_committed_manifest(path)
    sizes = {name: size for name, size in manifest["files"].items() if is_needed(name)}
    wrong = dict(damaged_files(path, manifest))
    damage = list(wrong.values())
    files = CheckedFiles(open_storage(path), path, tuple(sizes))
    _locate_tensors(files)
    unchecked = dict.fromkeys(name for name in sizes if name not in wrong)
    for rank in range(sum(name.startswith(f"{FOLDER}/") for name in sizes)):
        # These have no digests themselves, but are refused where they are not readable.
        unchecked.pop(digests_file(rank), None)
        try:
            written = files.written_by(rank)
        except DamagedCheckpointError as error:
            written = ()
            if digests_file(rank) not in wrong:
                damage.append(error.cause)
        for name in written:
            unchecked.pop(name, None)
            if name not in wrong:
                damage += _damage_in(files, name)
    return Verification(
        path,
        len(sizes),
        sum(sizes.values()),
        tuple(cause.removeprefix("its ") for cause in damage),
        tuple(unchecked),
    )


def _locate_tensors(files: CheckedFiles) -> None:
    """Has errors name tensors, unless the index is damaged, which is listed by itself."""
    with suppress(
        DamagedCheckpointError, MissingFileError, KeyError, TypeError, ValueError
    ):
        files.locate_tensors(json.loads(files.read_bytes(INDEX)))


def _damage_in(files: CheckedFiles, name: str) -> list[str]:
    try:
        return [error.cause for error in files.damage_in(name)]
    # A file that cannot be read is of no more use than a damaged one.
    except StorageError as error:
        return [error.cause]
