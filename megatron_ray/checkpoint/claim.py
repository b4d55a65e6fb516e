"""Claims a folder for one attempt of a run, where no driver guards it.

Owns: the file that names the folder's newest attempt. Must not know: tensors, torch.

Two runs that write to one folder at the same time would mix their checkpoints. The later
one writes its attempt into the file, and the earlier one ends before it commits anything
more.
"""

import json
from dataclasses import dataclass

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.exceptions import ErrorKind
from megatron_ray.storage.errors import MissingFileError
from megatron_ray.storage.storage import open_storage

_FILE = "run.json"


class TakenOverError(CheckpointError):
    """Another attempt has claimed the folder; this one must not write to it any more."""

    failure_kind = ErrorKind.USER


@dataclass(frozen=True)
class Claim:
    """The newest attempt that writes checkpoints into a folder."""

    attempt: int
    run: str | None
    """Id of its run."""

    def write(self, storage_path: str) -> None:
        """Replaces the claim of an earlier attempt. Raises StorageError."""
        content = json.dumps({"attempt": self.attempt, "run": self.run})
        open_storage(storage_path).write_bytes_atomic(_FILE, content.encode())

    def require(self, storage_path: str) -> None:
        """Raises TakenOverError when a later attempt has claimed the folder."""
        newest = read_claim(storage_path)
        if newest is not None and newest.attempt > self.attempt:
            cause = (
                f"attempt {newest.attempt} (run {newest.run}) was started in this folder after "
                f"attempt {self.attempt} (run {self.run}), which ends here; give each run a "
                "storage.path of its own"
            )
            raise TakenOverError("commit a checkpoint to", storage_path, cause)


def read_claim(storage_path: str) -> Claim | None:
    """Returns the claim of a folder; None without one. Raises StorageError."""
    try:
        body = json.loads(open_storage(storage_path).read_bytes(_FILE))
        return Claim(int(body["attempt"]), body["run"])
    # An unreadable claim protects nothing, and the next one replaces it.
    except (MissingFileError, KeyError, TypeError, ValueError):
        return None
