"""Defines the errors of storage.

Owns: their texts, and the conversion of errors of the operating system and Arrow.

Every StorageError is an OSError, and a missing file is also a FileNotFoundError, so
that code for local files can handle both alike.

    StorageError (OSError)
    ├── InvalidLocationError
    ├── MissingFileError (FileNotFoundError)
    ├── AccessDeniedError (PermissionError)
    └── DiskFullError
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from pyarrow import ArrowException

from megatron_ray.exceptions import ErrorKind, MegatronRayError


class StorageError(MegatronRayError, OSError):
    """An operation on storage failed; the message names operation, path and cause."""

    failure_kind = ErrorKind.STORAGE
    remedy: ClassVar[str] = ""
    """End of the message, where there is only one remedy."""

    def __init__(self, operation: str, path: str, cause: object) -> None:
        super().__init__(f"cannot {operation} {path}: {cause}{self.remedy}")
        self.operation = operation
        self.path = path
        self.cause = str(cause)

    # Without it, unpickling would call the constructor with the message alone.
    def __reduce__(self) -> tuple[type["StorageError"], tuple[str, str, str]]:
        return type(self), (self.operation, self.path, self.cause)


class InvalidLocationError(StorageError):
    """A path or URI is malformed, or its scheme is unknown."""


class MissingFileError(StorageError, FileNotFoundError):
    """The path does not exist."""


class AccessDeniedError(StorageError, PermissionError):
    """The process lacks permission for the operation."""


class DiskFullError(StorageError):
    """The storage has no room, or the user's quota is used up."""

    failure_kind = ErrorKind.DISK_FULL
    remedy = "; free some space there, or lower checkpoint.keep_last, then resume"


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def storage_errors(operation: str, path: str) -> Iterator[None]:
    """Converts errors of the operating system and Arrow to StorageError."""
    try:
        yield
    except StorageError:
        raise  # translated already, closer to the cause
    # From the special to the general: the first two are OSErrors too.
    except FileNotFoundError as error:
        raise MissingFileError(operation, path, "no such file or folder") from error
    except PermissionError as error:
        raise AccessDeniedError(operation, path, _reason(error)) from error
    except OSError as error:
        kind = StorageError
        if error.errno in _NO_ROOM:
            kind = DiskFullError
        raise kind(operation, path, _reason(error)) from error
    except ArrowException as error:
        raise StorageError(operation, path, error) from error


def _reason(error: OSError) -> object:
    # Arrow's texts name its own functions, and files that users do not know.
    if error.errno:
        return os.strerror(error.errno)
    return error.strerror or error
