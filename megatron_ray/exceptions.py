"""Defines the base classes of the library's exceptions and the kinds of failure.

Owns: the base classes and the kinds. Torch-free. Must not know: how callers handle
failures.

Each exception is defined beside the code that raises it. The second column is its kind
or, if it inherits the kind, its module:

    MegatronRayError                  internal
    ├── InputError                    user
    │   ├── ConfigError               config.problem
    │   ├── LayoutError               pipeline_parallel.schedules.layout
    │   ├── DataError                 data.preparation.errors
    │   ├── TokenizerError            data.tokenizer
    │   └── UnusableDataError         data.preparation.errors
    ├── StorageError                  storage (storage.errors)
    │   ├── InvalidLocationError      storage.errors
    │   ├── MissingFileError          storage.errors
    │   ├── AccessDeniedError         storage.errors
    │   ├── DiskFullError             storage.errors (disk_full)
    │   └── CheckpointError           checkpoint.directory
    │       ├── DamagedCheckpointError  checkpoint.directory (checkpoint)
    │       ├── NoWholeCheckpointError  checkpoint.resume_point (user)
    │       └── MixedRunsError        checkpoint.resume_point (user)
    ├── NonFiniteLossError            numerics
    ├── ScheduleError                 pipeline_parallel.schedules.simulation
    └── WriteAbandonedError           checkpoint.writer
"""

from enum import StrEnum
from typing import ClassVar


class ErrorKind(StrEnum):
    """The cause of an error, which determines whether a retry can help."""

    USER = "user"
    """The user's config, data or files; the message contains the field and the
    remedy."""
    STORAGE = "storage"
    """The storage of the job; a retry may succeed."""
    DISK_FULL = "disk_full"
    """The storage has no room; a retry would only repeat the error until files are
    deleted."""
    CHECKPOINT = "checkpoint"
    """A damaged checkpoint; a retry may succeed with an older one."""
    NUMERICS = "numerics"
    """The training itself, which a retry would only repeat."""
    INTERNAL = "internal"
    """Any other cause: a bug, or a lost peer."""


class MegatronRayError(Exception):
    """Base of every exception that the library defines."""

    failure_kind: ClassVar[ErrorKind] = ErrorKind.INTERNAL


class InputError(MegatronRayError):
    """A user's input cannot be used; the message names it and the remedy.

    A retry would fail in the same way.
    """

    failure_kind = ErrorKind.USER
