"""The command that converts.

Owns: its arguments and last words.

    python -m megatron_ray.checkpoint.hf import FOLDER OUT [--json]
    python -m megatron_ray.checkpoint.hf export CHECKPOINT OUT
        [--dtype bf16|fp32] [--max-shard-bytes N] [--json]
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
        description="Convert from and to Hugging Face.",
    )
    ways = parser.add_subparsers(dest="way", required=True)
    inwards = ways.add_parser("import", help="a folder of safetensors becomes a checkpoint")
    inwards.add_argument("source", help="folder or URI with config.json and safetensors")
    outwards = ways.add_parser(
        "export", help="a checkpoint becomes a folder of safetensors"
    )
    outwards.add_argument("source", help="path or URI of a committed checkpoint")
    outwards.add_argument(
        "--dtype",
        choices=sorted(_DTYPES),
        help="type of the weights; as the checkpoint has them when not given",
    )
    outwards.add_argument(
        "--max-shard-bytes",
        type=int,
        default=DEFAULT_SHARD_BYTES,
        help="largest file, unless a tensor is larger",
    )
    for way in (inwards, outwards):
        way.add_argument("out", help="folder to write; must not be there")
        way.add_argument("--json", action="store_true", help="one JSON object")
    return parser.parse_args(arguments)


def _convert(options: argparse.Namespace) -> Imported | Exported:
    if options.way == "import":
        return import_folder(options.source, options.out)
    return export_folder(
        options.source, options.out, _DTYPES.get(options.dtype), options.max_shard_bytes
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code. A user's mistake is one line on stderr."""
    options = _parse(arguments)
    try:
        done = _convert(options)
    except (StorageError, ValueError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    text = f"{done.path}: {done.tensors} tensors of {done.model_type}, {done.bytes} bytes"
    sys.stdout.write((json.dumps(asdict(done)) if options.json else text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
