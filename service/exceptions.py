"""Defines the errors of requests and jobs as plain exceptions, apart from HTTP.

    ServiceProblemError
    ├── RequestInvalidError         a parameter or body, other than a job spec, is wrong
    ├── SpecInvalidError            a job spec cannot run
    ├── NotFoundError
    ├── JobStateError               the job's state does not allow the change
    │   ├── JobActiveError
    │   ├── JobEndedError
    │   ├── JobNotRunningError
    │   ├── NoRoomError
    │   └── ProfileRunningError
    ├── DriverMessageError          a driver or agent must stop or send something else
    │   ├── DriverReplacedError
    │   ├── RecordGapError
    │   └── ProtocolUnsupportedError
    └── StorageUnavailableError     the job's storage does not answer

`service.http.errors` maps each `code` to a status. Errors that only exist in HTTP (tokens,
sizes of bodies, idempotency keys) are defined there.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar

from megatron_ray.config.problem import Problem
from megatron_ray.exceptions import redacted

MAX_ERRORS = 100
"""Single errors that a response lists."""
MAX_DETAIL_CHARS = 800
MAX_POINTER_CHARS = 160
MAX_JOINED_CHARS = 4000
"""Characters of the one detail that names several fields."""


class ServiceProblemError(Exception):
    """Base of all errors that are shown to the caller.

    `detail` contains the error and the remedy, `errors` the single fields; `extra` is
    added to the response for programs that must react to the error. Of errors without end
    only the first are kept.
    """

    code: ClassVar[str]
    """Stable name of the kind of error."""
    retry_after_s: ClassVar[int | None] = None
    """When to try again; None where that would not help."""

    def __init__(self, detail: str, errors: Iterable[Problem] = (), **extra: Any) -> None:
        # The detail is also the exception's text, for logs and tests.
        detail = _shortened(redacted(detail), MAX_JOINED_CHARS)
        super().__init__(detail)
        self.detail = detail
        self.errors = bounded(errors)
        self.extra = extra


# ---- wrong requests


class RequestInvalidError(ServiceProblemError):
    """A parameter or body, other than a job spec, has a wrong value."""

    code = "request_invalid"

    @classmethod
    def of_field(cls, pointer: str, code: str, detail: str) -> "RequestInvalidError":
        """Returns the error for one wrong field."""
        return cls(detail, [Problem(pointer, code, detail)])

    @classmethod
    def of_problems(cls, problems: Iterable[Problem]) -> "RequestInvalidError":
        """Returns the error for several wrong fields, all named in its detail."""
        errors = tuple(problems)
        return cls(joined(errors), errors)


class SpecInvalidError(ServiceProblemError):
    """A job spec cannot run; `errors` contains all of its errors."""

    code = "spec_invalid"

    def __init__(self, problems: Iterable[Problem], num_more: int = 0) -> None:
        """Makes the error of `problems` and of `num_more` that are not described."""
        every = tuple(problems)
        errors = bounded(every)
        # The first error is enough for one line; clients show `errors` for all of them.
        first = errors[0]
        detail = f"{first.pointer}: {first.detail}" if first.pointer else first.detail
        count = len(every) + num_more
        if count > len(errors):
            detail += f" (and {count - 1:,} more, of which the first are listed)"
        elif count > 1:
            detail += f" (and {count - 1} more)"
        super().__init__(detail, errors)


class NotFoundError(ServiceProblemError):
    """The job, attempt, rank or file does not exist."""

    code = "not_found"

    @classmethod
    def of_field(cls, pointer: str, code: str, detail: str) -> "NotFoundError":
        """Returns the error for the parameter that names what does not exist."""
        return cls(detail, [Problem(pointer, code, detail)])


# ---- conflicts with a job's state


class JobStateError(ServiceProblemError):
    """The job's state does not allow the requested change."""


class JobActiveError(JobStateError):
    """The job has not ended yet."""

    code = "job_active"


class JobEndedError(JobStateError):
    """The job has ended."""

    code = "job_ended"


class JobNotRunningError(JobStateError):
    """The job is neither running nor ended."""

    code = "job_not_running"


class NoRoomError(JobStateError):
    """The cluster cannot hold the job at the requested size now."""

    code = "no_room"


class ProfileRunningError(JobStateError):
    """An earlier profile of the job is not written yet."""

    code = "profile_running"


# ---- messages of drivers and agents


class DriverMessageError(ServiceProblemError):
    """A message of a driver or an agent that must not be applied."""


class DriverReplacedError(DriverMessageError):
    """A newer incarnation of the driver has taken over; `extra` holds its epoch."""

    code = "fenced"


class RecordGapError(DriverMessageError):
    """Records are missing before those sent; `extra` holds the last number stored."""

    code = "gap"


class ProtocolUnsupportedError(DriverMessageError):
    """The message's protocol is too old or too new; `extra` holds the service's."""

    code = "protocol_unsupported"


class StorageUnavailableError(ServiceProblemError):
    """The job's storage cannot be read at the moment."""

    code = "unavailable"
    retry_after_s = 5


def joined(problems: Iterable[Problem]) -> str:
    """Returns one line with every field and its error."""
    sentences = []
    for problem in problems:
        # A problem of the whole body has no pointer.
        sentences.append(f"{problem.pointer}: {problem.detail}".removeprefix(": "))
    return "; ".join(sentences)


def bounded(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Returns the first problems, each cut to a length that a person reads."""
    shown = []
    for problem in islice(problems, MAX_ERRORS):
        shown.append(
            replace(
                problem,
                pointer=_shortened(problem.pointer, MAX_POINTER_CHARS),
                detail=_shortened(problem.detail, MAX_DETAIL_CHARS),
            )
        )
    return tuple(shown)


def _shortened(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    return text[:max_chars] + "..."
