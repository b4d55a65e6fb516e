"""Runs the library's commands in a subprocess, since the service never imports torch.

Owns: calling them, and resolving a job id to its newest checkpoint. Must not know: the
work of the commands.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_ray.validation.storage.path_rules import form_error
from service.cli.connection import connect
from service.cli.failure import CommandError


def check_form(path: str) -> None:
    """Raises CommandError for a path or URI that a spec could not name either."""
    error = form_error(path)
    if error is not None:
        _, detail = error
        raise CommandError(detail, exit_code=2)


def checkpoint_path(
    checkpoint: str, url: str | None, token: str | None, data_dir: Path | None
) -> str:
    """Returns a checkpoint's path as it is, and for a job id its newest checkpoint.

    Raises CommandError when the job has none, and for a malformed URI.
    """
    check_form(checkpoint)
    # A folder may be named like a job.
    if not checkpoint.startswith("job-") or Path(checkpoint).exists():
        return checkpoint
    with connect(url, token, data_dir) as client:
        checkpoints = client.checkpoints(checkpoint)["data"]
    if not checkpoints:
        raise CommandError(
            f"{checkpoint} has no committed checkpoint yet",
            remedy=f"`megatron-ray show {checkpoint}` shows its progress",
        )
    # A restarted attempt may commit a step again; its version is the newer one.
    newest = max(checkpoints, key=lambda entry: (entry["step"], entry["attempt"]))
    return str(newest["path"])


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Returns the options that are not None as command line arguments.

    An option with a list is repeated.
    """
    arguments: list[str] = []
    for name, value in options.items():
        values = value
        if not isinstance(value, list):
            values = [value]
        for one in values:
            if one is not None:
                arguments += [name, str(one)]
    return arguments


def run_library(
    module: str,
    arguments: Sequence[str],
    needed: str,
    on_piece: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Returns the JSON object that the command prints, which must have the key `needed`.

    With `on_piece` the command also streams: it prints JSON strings, one per line, which
    are passed on at once. Raises CommandError with the last line of its stderr.
    """
    # The same interpreter, whose environment has torch installed.
    command = [sys.executable, "-m", module, *arguments, "--json"]
    if on_piece is not None:
        command.append("--stream")
    # Not a pipe, which would block the command once it is full.
    with tempfile.TemporaryFile("w+") as errors:
        try:
            lines, exit_code = _run(command, errors, on_piece)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        if exit_code != 0:
            errors.seek(0)
            # A traceback or warnings of libraries may precede the last line.
            message = f"{module} failed with exit code {exit_code}"
            error_lines = errors.read().strip().splitlines()
            if error_lines:
                message = error_lines[-1].removeprefix("error: ")
            raise CommandError(message)
    try:
        answer: dict[str, Any] = json.loads("".join(lines))
        answer[needed]
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{module} did not print JSON with the key {needed!r}"
        ) from error
    return answer


def _run(
    command: Sequence[str], errors: IO[str], on_piece: Callable[[str], None] | None
) -> tuple[list[str], int]:
    """Runs a command; returns its lines that are no pieces, and its exit code."""
    lines = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            # A line is a JSON string or, at the end, a JSON object.
            if on_piece is not None and line.startswith('"'):
                on_piece(json.loads(line))
            else:
                lines.append(line)
    return lines, process.returncode
