"""Runs the command that checks the bytes of a checkpoint.

    python -m megatron_ray.checkpoint.integrity CHECKPOINT [--json]

Its exit code is 1 for a checkpoint that is damaged. It uses argparse, because the library
must not depend on typer, which the service's command line uses.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from megatron_ray.checkpoint.integrity.verification import verify_checkpoint
from megatron_ray.storage.errors import StorageError


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ray.checkpoint.integrity",
        description="Compare all bytes of a checkpoint with those that were written.",
    )
    parser.add_argument("checkpoint", help="path or URI of a committed checkpoint")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object, with exit code 0 for damage too",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    A user's error is one line on stderr.
    """
    options = _parse(arguments)
    try:
        result = verify_checkpoint(options.checkpoint)
    except StorageError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    if options.json:
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
        return 0
    for line in result.damage:
        sys.stdout.write(f"damaged: {line}\n")
    for name in result.unchecked:
        sys.stdout.write(f"unchecked: {name}\n")
    sys.stdout.write(f"{result.path}: {result.files} files, {result.bytes} bytes\n")
    return int(bool(result.damage))


if __name__ == "__main__":
    sys.exit(main())
