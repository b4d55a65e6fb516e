"""What a command says when it fails.

Owns: turning errors into one message with field and remedy. Must not know: commands.
"""

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

from service.client import ServiceError

_REMEDIES = {
    "unreachable": "start the local stack with `megatron-ray up`, or check --url",
    "http_401": "pass the right --token (`megatron-ray up` prints where the local one is)",
    "http_404": "`megatron-ray jobs` lists what there is",
}


class CommandError(Exception):
    """The asked-for thing did not happen: one message, what to do about it, and the
    exit code.
    """

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
        """The problem as the service gave it, or one of the same shape."""
        return self.body or {"title": "failed", "detail": str(self), "remedy": self.remedy}


def from_service(error: ServiceError) -> CommandError:
    """A refusal in words: one line per wrong field."""
    # With wrong fields the detail repeats the first of them, so the title says better
    # what this is about.
    lines = [
        str(error.problem.get("title") or error.detail) if error.errors else error.detail
    ]
    lines += [f"  {problem.pointer or '/'}: {problem.detail}" for problem in error.errors]
    remedy = _REMEDIES.get(error.code) or _REMEDIES.get(f"http_{error.status}", "")
    if error.status >= 500 and error.request_id:
        remedy = f"the service's log says more, under request {error.request_id}"
    body = error.problem or {
        "title": "failed",
        "code": error.code,
        "detail": error.detail,
        "remedy": remedy,
    }
    return CommandError("\n".join(lines), remedy=remedy, body=body)


def show_failure(failure: CommandError, as_json: bool) -> None:
    """To stderr: JSON when the command was asked for JSON, else words."""
    if as_json:
        sys.stderr.write(json.dumps(failure.as_json()) + "\n")
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[red]error:[/red] {escape(str(failure))}")
    if failure.remedy:
        console.print(f"  [dim]->[/dim] {escape(failure.remedy)}")
