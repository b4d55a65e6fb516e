"""Turns errors into one message with field and remedy.

Must not know: commands.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape

from service.client import ServiceError

# By error code, then by HTTP status.
_REMEDIES = {
    "unreachable": "start the local stack with `megatron-ray up`, or check --url",
    "http_401": "set --token (`megatron-ray up` prints where the local stack's token is)",
}
# By the parameter that a request has wrong.
_REMEDIES_OF_FIELDS = {
    "/path/job_id": "`megatron-ray jobs` lists all jobs",
    "/query/rank": "choose one of these with --rank",
    "/query/attempt": "`megatron-ray attempts JOB` lists them",
}


_PARAMETERS = ("/path/", "/query/", "/header/")


class CommandError(Exception):
    """A command failed; holds the message, the remedy and the exit code."""

    def __init__(
        self,
        message: str,
        *,
        remedy: str = "",
        exit_code: int = 1,
        body: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.exit_code = exit_code
        self.body = body

    def as_json(self) -> dict[str, Any]:
        """Returns the service's problem document, or one of the same shape."""
        return self.body or {"title": "failed", "detail": str(self), "remedy": self.remedy}


def with_field_lines(title: str, errors: Iterable[tuple[str, str]]) -> str:
    """Returns a message of the title and one line per (JSON pointer, detail)."""
    lines = [title]
    for pointer, detail in errors:
        lines.append(f"  {pointer or '/'}: {detail}")
    return "\n".join(lines)


def from_service(error: ServiceError) -> CommandError:
    """Returns the error of a refused request, with one line per invalid field."""
    title = error.detail
    fields = [(problem.pointer, problem.detail) for problem in error.errors]
    if fields and fields[0][0].startswith(_PARAMETERS):
        # Parameters are options here, so their pointers would not help.
        fields = []
    elif fields:
        # The detail repeats the first invalid field, so the title is the better start.
        title = str(error.problem.get("title") or error.detail)
    remedy = _REMEDIES.get(error.code) or _REMEDIES.get(f"http_{error.status}", "")
    for problem in error.errors:
        remedy = remedy or _REMEDIES_OF_FIELDS.get(problem.pointer, "")
    if error.status >= 500 and error.request_id:
        remedy = f"see request {error.request_id} in the service's log"
    # A service that did not answer sent no problem document.
    body = error.problem or {
        "title": "failed",
        "code": error.code,
        "detail": error.detail,
        "remedy": remedy,
    }
    return CommandError(with_field_lines(title, fields), remedy=remedy, body=body)


def show_failure(failure: CommandError, as_json: bool) -> None:
    """Prints the failure to stderr, as JSON or as text."""
    if as_json:
        sys.stderr.write(json.dumps(failure.as_json()) + "\n")
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[red]error:[/red] {escape(str(failure))}")
    if failure.remedy:
        console.print(f"  [dim]->[/dim] {escape(failure.remedy)}")
