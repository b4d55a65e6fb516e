"""The library's exceptions and what kind of failure each of them is.

Owns: the base classes and the kinds. Torch-free. Must not know: what a caller does about a
failure.

Each exception is defined beside the code that raises it:

    MegatronRayError                  internal
    ├── InputError                    user
    │   ├── ConfigError               config.problem
    │   ├── LayoutError               pipeline_parallel.schedules.layout
    │   ├── DataError                 data.sources
    │   ├── TokenizerError            data.tokenizer
    │   └── UnusableDataError         data.prepare
    ├── StorageError                  storage (storage.storage)
    │   ├── MissingFileError          storage.storage
    │   └── CheckpointError           checkpoint.directory
    ├── NonFiniteLossError            numerics (training)
    ├── ScheduleError                 pipeline_parallel.schedules.simulation
    └── WriteAbandonedError           checkpoint.writer
"""

from enum import StrEnum
from typing import ClassVar


class ErrorKind(StrEnum):
    """Who or what has to change before another try can end differently."""

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
    """The user gave something that cannot work; the text says what and how to mend it.

    Nothing is gained by trying again.
    """

    failure_kind = ErrorKind.USER
