"""The library's exceptions and what kind of failure each of them is.

Owns: the base classes and the kinds. Torch-free. Must not know: what a caller does about a
failure.

Each exception is defined beside the code that raises it. Beside it stands its kind, or,
where it has the kind of the class above, its module:

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
    │   └── CheckpointError           checkpoint.directory
    ├── NonFiniteLossError            numerics
    ├── ScheduleError                 pipeline_parallel.schedules.simulation
    └── WriteAbandonedError           checkpoint.writer
"""

from enum import StrEnum
from typing import ClassVar


class ErrorKind(StrEnum):
    """The cause of an error: who has to change something before another try."""

    USER = "user"
    """The user's config, data or files; the message names the field and the remedy."""
    STORAGE = "storage"
    """The storage of the job; another try may find it working."""
    NUMERICS = "numerics"
    """The training itself: the same steps give the same numbers."""
    INTERNAL = "internal"
    """None of these: a bug, or a peer that went away."""


class MegatronRayError(Exception):
    """Base of every exception that the library defines."""

    failure_kind: ClassVar[ErrorKind] = ErrorKind.INTERNAL


class InputError(MegatronRayError):
    """An input of the user cannot work; the message names it and how to mend it.

    Nothing is gained by trying again.
    """

    failure_kind = ErrorKind.USER
