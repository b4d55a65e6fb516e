"""The library's own commands, run in a process of their own because the service never
imports torch. Owns: calling them, and finding the checkpoint that a person means. Must
not know: what they do.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from service.cli.connection import connect
from service.cli.failure import CommandError


def checkpoint_path(
    checkpoint: str, url: str | None, token: str | None, data_dir: Path | None
) -> str:
    """The path as it is, or that of a job's newest checkpoint.

    Raises Failure when the job has none.
    """
    if not checkpoint.startswith("job-") or Path(checkpoint).exists():
        return checkpoint
    with connect(url, token, data_dir) as client:
        found = client.checkpoints(checkpoint)["data"]
    if not found:
        raise CommandError(
            f"{checkpoint} has no committed checkpoint yet",
            remedy=f"`megatron-ray show {checkpoint}` says where it is",
        )
    return str(max(found, key=lambda entry: (entry["step"], entry["attempt"]))["path"])


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options that were given, as a command line."""
    return [
        part
        for name, value in options.items()
        if value is not None
        for part in (name, str(value))
    ]


def run_library(module: str, arguments: Sequence[str], needed: str) -> dict[str, Any]:
    """The JSON object that the command answers with; `needed` must be in it.

    Raises Failure with its last words.
    """
    command = [sys.executable, "-m", module, *arguments, "--json"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise CommandError(
            said[-1].removeprefix("error: ")
            if said
            else f"{module} ended with exit code {done.returncode}"
        )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
        answer[needed]
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{module} did not answer with JSON that has `{needed}`"
        ) from error
    return answer
