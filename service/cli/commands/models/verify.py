"""Checks the bytes of checkpoints. Needs no service, but for a job's newest one."""

from typing import Annotated

import typer
from rich.markup import escape

from service.cli.connection import DataDir, Token, Url
from service.cli.library import checkpoint_path, run_library
from service.cli.output import AsJson, console, print_json, size

_MODULE = "megatron_ray.checkpoint.integrity"

checkpoint_app = typer.Typer(
    name="checkpoint",
    help="Check checkpoints.",
    no_args_is_help=True,
)


@checkpoint_app.callback()
def _group() -> None:
    """Makes `verify` a command of the group although it is the only one."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.add_typer(checkpoint_app)


@checkpoint_app.command("verify")
def verify(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Path or URI of a committed checkpoint, or a job id for its newest one.",
            show_default=False,
        ),
    ],
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Compare all bytes of a checkpoint with those that were written.

    Exit code 1 when some are damaged.
    """
    path = checkpoint_path(checkpoint, url, token, data_dir)
    answer = run_library(_MODULE, [path], "damage")
    if as_json:
        print_json(answer)
    else:
        out = console()
        for line in answer["damage"]:
            out.print(f"[red]damaged[/red]: {escape(line)}")
        for name in answer["unchecked"]:
            out.print(f"not checked: {escape(name)} has no digests, only its size is known")
        verdict = "[green]whole[/green]"
        if answer["damage"]:
            verdict = f"[red]damaged in {len(answer['damage'])} places[/red]"
        out.print(
            f"{escape(path)}: {verdict}, {answer['files']} files, {size(answer['bytes'])}"
        )
    if answer["damage"]:
        raise typer.Exit(1)
