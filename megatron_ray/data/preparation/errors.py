"""Defines the errors of a user's data.

Owns: DataError, UnusableDataError, and the translation of read errors to them.

Code that reads a source raises DataError, which contains the field but not the source's
position in the spec. The caller adds the source's JSON pointer and raises
UnusableDataError.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from megatron_ray.config.problem import Problem
from megatron_ray.exceptions import InputError
from megatron_ray.storage.errors import StorageError

_MAX_CAUSE_CHARS = 300


class DataError(InputError):
    """One field of a source is wrong."""

    def __init__(self, code: str, detail: str, field: str = "path") -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.field = field

    def problem(self, pointer: str) -> Problem:
        """Returns the problem of the field, given the JSON pointer of the source."""
        return Problem(f"{pointer}/{self.field}", self.code, self.detail)


class UnusableDataError(InputError):
    """The data cannot be prepared as configured.

    `problems` contain the fields to change and the remedies.
    """

    def __init__(self, problems: list[Problem]) -> None:
        lines = [f"{problem.pointer}: {problem.detail}" for problem in problems]
        super().__init__("; ".join(lines))
        self.problems = problems


@contextmanager
def errors_at(pointer: str) -> Iterator[None]:
    """Converts DataError to UnusableDataError at the JSON pointer of a source."""
    try:
        yield
    except DataError as error:
        raise UnusableDataError([error.problem(pointer)]) from error


@contextmanager
def read_errors(
    name: str, remedy: str = "check the path and the credentials"
) -> Iterator[None]:
    """Converts errors of reading the file `name` to DataError.

    `remedy` is that of errors which do not show their cause.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        detail = f"{name} is not UTF-8 text (byte 0x{byte:02x}); convert it to UTF-8"
        raise DataError("not_utf8", detail) from error
    # The next two are special cases of OSError with their own remedies.
    except PermissionError as error:
        # A folder in it may be the one.
        if isinstance(error, StorageError):
            name = error.path
        detail = (
            f"{name} may not be read by the user that runs the job; change its permissions"
        )
        raise DataError("unreadable", detail) from error
    except FileNotFoundError as error:
        detail = f"{name} does not exist where the job runs; check the path"
        raise DataError("not_found", detail) from error
    except (OSError, pa.ArrowException) as error:
        detail = f"{name} cannot be read: {short_cause(error)}; {remedy}"
        raise DataError("unreadable", detail) from error


def short_cause(error: BaseException) -> str:
    """Returns the first line of an error's text, without the path in it."""
    # Arrow's errors may have many lines.
    first_line = (cause(error) or type(error).__name__).splitlines()[0]
    return first_line[:_MAX_CAUSE_CHARS]


def cause(error: BaseException) -> str:
    """Returns an error's text; for a StorageError its cause, without the path."""
    if isinstance(error, StorageError):
        return error.cause
    return str(error)
