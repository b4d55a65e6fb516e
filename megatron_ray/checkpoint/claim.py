"""Claims a folder for one attempt of a run, where no driver guards it.

Owns: the file that names the folder's newest attempt and its process. Must not know:
tensors, torch.

Two runs that write to one folder at the same time would mix their checkpoints. Where it
can be seen that the earlier one is still running, the later one is refused. Where it
cannot, the later one may take the folder over by writing its own attempt into the file;
the earlier one then ends before it commits anything more.
"""

import json
import os
import socket
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.exceptions import ErrorKind
from megatron_ray.storage.errors import MissingFileError, StorageError
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
    start: str = ""
    """Id of the start of its process; attempts that start at once have one number."""
    host: str = ""
    """Name of the machine of rank 0; empty in claims of earlier versions."""
    pid: int = 0
    """Process id of rank 0."""
    process: str | None = None
    """What distinguishes rank 0 from other processes that have had its id."""
    has_ended: bool = False

    @classmethod
    def of_this_process(cls, attempt: int, run: str | None) -> Self:
        """Returns the claim of an attempt whose rank 0 is this process."""
        start = uuid.uuid4().hex
        pid = os.getpid()
        return cls(attempt, run, start, socket.gethostname(), pid, process_of(pid))

    @property
    def is_of_this_machine(self) -> bool:
        """Whether the attempt runs, or ran, on this machine."""
        return self.host == socket.gethostname()

    @property
    def may_be_running(self) -> bool:
        """Whether the attempt may still be running; it does on this machine."""
        if self.has_ended or not self.host:
            return False
        if not self.is_of_this_machine:
            return True
        # The process is this one where runs follow each other in it.
        if self.process is None or self.pid == os.getpid():
            return False
        return process_of(self.pid) == self.process

    def write(self, storage_path: str) -> None:
        """Replaces the claim of an earlier attempt. Raises StorageError."""
        content = json.dumps(asdict(self))
        open_storage(storage_path).write_bytes_atomic(_FILE, content.encode())

    def require(self, storage_path: str) -> None:
        """Raises TakenOverError when a later attempt has claimed the folder."""
        newest = read_claim(storage_path)
        if newest is None or newest.start == self.start or newest.attempt < self.attempt:
            return
        cause = (
            f"attempt {newest.attempt} (run {newest.run}) was started in this folder after "
            f"attempt {self.attempt} (run {self.run}), which ends here; give each run a "
            "storage.path of its own"
        )
        raise TakenOverError("commit a checkpoint to", storage_path, cause)

    def end(self, storage_path: str) -> None:
        """Notes that the attempt has ended, unless a later one has claimed the folder."""
        # Without the note a later run may need --resume to take the folder over.
        with suppress(StorageError):
            if read_claim(storage_path) == self:
                replace(self, has_ended=True).write(storage_path)


def read_claim(storage_path: str) -> Claim | None:
    """Returns the claim of a folder; None without one. Raises StorageError."""
    try:
        body: dict[str, Any] = json.loads(open_storage(storage_path).read_bytes(_FILE))
        known = {name: body[name] for name in Claim.__dataclass_fields__ if name in body}
        return Claim(**{**known, "attempt": int(body["attempt"]), "run": body["run"]})
    # An unreadable claim protects nothing, and the next one replaces it.
    except (MissingFileError, KeyError, TypeError, ValueError):
        return None


def process_of(pid: int) -> str | None:
    """Returns boot and start time of a process, which no other one with its id has.

    None when there is no such process any more. Ids are used again, in containers and
    after a restart of the machine even soon.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    # The name before it, in parentheses, may contain spaces.
    state, *fields = stat.rpartition(")")[2].split()
    # A zombie has ended.
    if state == "Z":
        return None
    return f"{boot}/{fields[18]}"
