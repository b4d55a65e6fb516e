"""The command that checks a model's maximal update parametrization (muP)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from service.cli.commands.models.coordinate_plot import draw
from service.cli.failure import CommandError
from service.cli.library import run_library
from service.cli.numbers import at_least
from service.cli.output import AsJson, console, print_json
from service.cli.spec_file import Overrides, read_spec
from service.cli.spec_parsing import parse_spec

# Run as a module in a process of its own: it imports torch.
_MODULE = "megatron_ray.training.coordinate_check"
_WIDTHS = (64, 128, 256, 512)

mup_app = typer.Typer(
    name="mup",
    help="Check the maximal update parametrization of a model.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    app.add_typer(mup_app)


@mup_app.callback()
def _group() -> None:
    """Keeps `check` a subcommand, although it is the only one."""


@mup_app.command("check")
def check(
    spec: Annotated[
        Path | None,
        typer.Argument(
            help="Job spec whose model and optimizer are checked; - reads stdin. Default: "
            "the preset gpt-tiny.",
            metavar="[SPEC]",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    widths: Annotated[
        list[int] | None,
        typer.Option(
            "--width",
            parser=at_least(16),
            help="Hidden size of a model to train, repeatable; the smallest is the base "
            "model's. Default: 64, 128, 256 and 512.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(parser=at_least(1), help="Steps that each model trains.")
    ] = 5,
    seeds: Annotated[
        int, typer.Option(parser=at_least(1), help="Models of each width.")
    ] = 2,
    plot: Annotated[
        Path | None,
        typer.Option(help="SVG file to write the plot to.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train small models of several widths and compare how much activations change.

    Under muP the change does not depend on the width; otherwise it grows. Exits with 1 if it
    does under muP too.
    """
    chosen = sorted({*(widths or _WIDTHS)})
    if len(chosen) < 2:
        raise CommandError(
            "one width shows no growth", remedy="repeat --width", exit_code=2
        )
    arguments = ["--fields", json.dumps(_fields(spec, overrides)), "--steps", str(steps)]
    arguments += ["--seeds", str(seeds), "--widths", *map(str, chosen)]
    answer = run_library(_MODULE, arguments, "mup")
    if plot is not None:
        plot.write_text(draw(answer))
    if as_json:
        print_json(answer)
    else:
        _show(answer, plot)
    if not answer["is_flat"]:
        raise typer.Exit(1)


def _fields(spec: Path | None, overrides: list[str] | None) -> dict[str, Any]:
    """Returns the model and the optimizer of a spec, none without one."""
    if spec is None:
        if overrides:
            raise CommandError("--set needs a SPEC", remedy="name one", exit_code=2)
        return {}
    job = parse_spec(read_spec(spec, overrides))
    fields: dict[str, Any] = job.model_dump(mode="json", include={"model", "optimizer"})
    return fields


def _show(answer: Mapping[str, Any], plot: Path | None) -> None:
    out = console()
    for name, title in (("mup", "muP"), ("standard", "standard parametrization")):
        table = Table(title=f"{title}: change after {answer['steps']} steps", box=None)
        table.add_column("activation")
        for width in answer["widths"]:
            table.add_column(f"width {width}", justify="right")
        table.add_column("grows with width to the", justify="right")
        for coordinate in answer[name]:
            changes = [f"{change:.3g}" for change in coordinate["changes"]]
            table.add_row(coordinate["name"], *changes, f"{coordinate['growth']:+.2f}")
        out.print(table)
    if answer["is_flat"]:
        out.print("[green]muP is flat[/green]: numbers of the base model fit wider ones")
    else:
        out.print("[red]muP is not flat[/red]: a change grows or shrinks with the width")
    if plot is not None:
        out.print(f"[dim]plot: {escape(str(plot))}[/dim]")
