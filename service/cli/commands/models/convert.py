"""Commands that convert models from and to Hugging Face's format.

Both run in the folder of the command and need no service.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from service.cli.connection import DataDir, Token, Url
from service.cli.failure import CommandError
from service.cli.library import as_arguments, check_form, checkpoint_path, run_library
from service.cli.output import AsJson, console, print_json, size

# Run as a module in a process of its own: it imports torch.
_MODULE = "megatron_ray.checkpoint.hf"
# Sizes are read as transformers reads them: KB is 1000 bytes, KiB is 1024.
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}

convert_app = typer.Typer(
    name="convert",
    help="Convert models from and to Hugging Face's format.",
    no_args_is_help=True,
)
Out = Annotated[
    Path, typer.Argument(help="Folder to write; must not exist.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    app.add_typer(convert_app)


@convert_app.command("import")
def import_(
    folder: Annotated[
        str,
        typer.Argument(
            help="Folder or URI with config.json and safetensors files.",
            show_default=False,
        ),
    ],
    out: Out,
    as_json: AsJson = False,
) -> None:
    """Convert a Hugging Face model to a checkpoint, with a job spec that starts from it."""
    check_form(folder)
    answer = run_library(_MODULE, ["import", folder, str(out)], "path")
    _show(answer, as_json, f"train it with: megatron-ray submit {answer.get('spec')}")


@convert_app.command("export")
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Path or URI of a committed checkpoint, or a job id for its newest one.",
            show_default=False,
        ),
    ],
    out: Out,
    dtype: Annotated[
        str | None,
        typer.Option(help="Weight dtype, bf16 or fp32. Default: the checkpoint's."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Maximum size of one file, such as 5GB.")
    ] = "5GB",
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint to a folder that transformers can load."""
    # Checked here, before requesting a path from the service.
    if dtype not in (None, "bf16", "fp32"):
        raise CommandError(
            f"--dtype {dtype!r} is not supported", remedy="use bf16 or fp32", exit_code=2
        )
    options = {"--dtype": dtype, "--max-shard-bytes": _num_bytes(max_shard_size)}
    path = checkpoint_path(checkpoint, url, token, data_dir)
    answer = run_library(
        _MODULE, ["export", path, str(out), *as_arguments(options)], "path"
    )
    load = f"AutoModelForCausalLM.from_pretrained({str(out)!r})"
    _show(answer, as_json, f"load it with: {load}")


def _num_bytes(option: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", option.strip())
    num_bytes = 0
    if match:
        # An unknown unit counts as zero bytes, which is refused below.
        num_bytes = int(float(match[1]) * _UNITS.get(match[2].upper(), 0))
    if num_bytes < 1:
        raise CommandError(
            f"--max-shard-size {option!r} is not a size",
            remedy="use a number and a unit, such as 500MB or 5GB",
            exit_code=2,
        )
    return num_bytes


def _show(answer: dict[str, Any], as_json: bool, next_step: str) -> None:
    if as_json:
        print_json(answer)
        return
    out = console()
    out.print(
        f"wrote {escape(str(answer['path']))}: {answer['tensors']} tensors of "
        f"{answer['model_type']}, {size(answer['bytes'])}"
    )
    for note in answer["notes"]:
        out.print(f"note: {escape(note)}")
    out.print(f"[dim]{escape(next_step)}[/dim]")
