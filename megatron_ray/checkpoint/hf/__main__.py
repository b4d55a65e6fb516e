"""Runs the command that converts between checkpoints and Hugging Face folders.

    python -m megatron_ray.checkpoint.hf import FOLDER OUT [--json]
    python -m megatron_ray.checkpoint.hf export CHECKPOINT OUT
        [--dtype bf16|fp32] [--max-shard-bytes N] [--json]

It uses argparse, because the library must not depend on typer, which the service's
command line uses.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from megatron_ray.checkpoint.hf.exporting import (
    DEFAULT_SHARD_BYTES,
    Exported,
    export_folder,
)
from megatron_ray.checkpoint.hf.importing import Imported, import_folder
from megatron_ray.storage.errors import StorageError

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ray.checkpoint.hf",
        description="Convert checkpoints from and to Hugging Face format.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importer = commands.add_parser(
        "import", help="convert a folder of safetensors to a checkpoint"
    )
    importer.add_argument("source", help="folder or URI with config.json and safetensors")
    exporter = commands.add_parser(
        "export", help="convert a checkpoint to a folder of safetensors"
    )
    exporter.add_argument("source", help="path or URI of a committed checkpoint")
    exporter.add_argument(
        "--dtype",
        choices=sorted(_DTYPES),
        help="type of the weights; default: as in the checkpoint",
    )
    exporter.add_argument(
        "--max-shard-bytes",
        type=int,
        default=DEFAULT_SHARD_BYTES,
        help="largest file in bytes, unless a tensor is larger; default: %(default)s",
    )
    for command in (importer, exporter):
        command.add_argument("out", help="folder to write; must not exist")
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def _convert(options: argparse.Namespace) -> Imported | Exported:
    if options.command == "import":
        return import_folder(options.source, options.out)
    dtype = _DTYPES.get(options.dtype)
    return export_folder(options.source, options.out, dtype, options.max_shard_bytes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    A user's error is one line on stderr.
    """
    options = _parse(arguments)
    try:
        result = _convert(options)
    except (StorageError, ValueError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    if options.json:
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
    else:
        sys.stdout.write(
            f"{result.path}: {result.tensors} tensors of {result.model_type}, "
            f"{result.bytes} bytes\n"
        )
        for note in result.notes:
            sys.stdout.write(f"note: {note}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
