"""Decides which operations of the file system fail or wait.

Owns: the faults that are switched on, and the kinds of operations they are about. Must
not know: files, how requests arrive.
"""

import errno
import json
import threading
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from tests.support.faulty_storage.protocol import Operation


class Kind(StrEnum):
    """What a fault may be about."""

    LOOK = "look"
    OPEN = "open"
    READ = "read"
    WRITE = "write"
    FSYNC = "fsync"
    CREATE = "create"
    CHANGE = "change"


_KINDS = {
    Kind.LOOK: (
        Operation.LOOKUP,
        Operation.GETATTR,
        Operation.OPENDIR,
        Operation.READDIR,
        Operation.STATFS,
        Operation.READLINK,
    ),
    Kind.OPEN: (Operation.OPEN,),
    Kind.READ: (Operation.READ,),
    Kind.WRITE: (Operation.WRITE,),
    Kind.FSYNC: (Operation.FSYNC, Operation.FSYNCDIR),
    Kind.CREATE: (Operation.CREATE, Operation.MKDIR, Operation.SYMLINK, Operation.LINK),
    Kind.CHANGE: (
        Operation.RENAME,
        Operation.RENAME2,
        Operation.UNLINK,
        Operation.RMDIR,
        Operation.SETATTR,
    ),
}
KIND_OF = {operation: kind for kind, members in _KINDS.items() for operation in members}
"""Kind of each operation; others, such as closing a file, never fail."""

ALL = tuple(Kind)
WRITES = (Kind.WRITE, Kind.FSYNC, Kind.CREATE, Kind.CHANGE)
READS = (Kind.READ, Kind.OPEN)
FULL = (Kind.WRITE, Kind.CREATE)
"""What fails on a full disk."""


@dataclass(frozen=True)
class Fault:
    """Operations of these kinds fail with an error, or wait, for some seconds."""

    kinds: tuple[str, ...]
    seconds: float
    """How long the fault lasts."""
    error: str | None = None
    """Name of the errno, such as EIO; None: the operations wait until its end."""

    def to_line(self) -> str:
        """Returns it as a line for the server."""
        return f"{json.dumps(asdict(self))}\n"

    @classmethod
    def from_line(cls, line: str) -> "Fault":
        """Reads such a line."""
        fields = json.loads(line)
        return cls(tuple(fields["kinds"]), fields["seconds"], fields["error"])


@dataclass
class FaultSwitch:
    """The fault that is on, if any."""

    _changed: threading.Condition = field(default_factory=threading.Condition)
    _fault: Fault | None = None
    _ends_at: float = 0.0

    def turn_on(self, fault: Fault) -> None:
        """Replaces the fault; one of 0 seconds ends it."""
        with self._changed:
            self._fault = fault
            self._ends_at = time.monotonic() + fault.seconds
            self._changed.notify_all()

    def pass_through(self, operation: int) -> None:
        """Returns when an operation may be carried out. Raises OSError for its fault."""
        kind = KIND_OF.get(Operation(operation)) if operation in _KNOWN else None
        with self._changed:
            while True:
                remaining_s = self._ends_at - time.monotonic()
                fault = self._fault
                if fault is None or remaining_s <= 0 or kind not in fault.kinds:
                    return
                if fault.error is not None:
                    raise OSError(getattr(errno, fault.error), fault.error)
                self._changed.wait(remaining_s)


_KNOWN = frozenset(Operation)
