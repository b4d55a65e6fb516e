"""`megatron-ray plan`: how a job would run, and which layouts would be quickest.

Must not know: how any of it is worked out.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from service.cli.connection import DataDir, Token, Url, connect
from service.cli.failure import CommandError
from service.cli.output import AsJson, console, number, print_json, print_table, size
from service.cli.spec_file import Overrides, SpecFile, read_spec

_MOST_ROWS = 64
_AXES = ("tp", "cp", "ep", "dp", "pp")
Json = Mapping[str, Any]
Hardware = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        help="Device to plan for: A100, H100, H200, B200 or CPU; the cluster's when not given.",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds this command."""
    app.command("plan")(plan)


def plan(
    spec: SpecFile,
    overrides: Overrides = None,
    hardware: Hardware = None,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Show the quickest layouts that fit instead.")
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --suggest: how many ranks; what the job would get when not given.",
        ),
    ] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Say how a job would run, and start nothing.

    Exit code 0 only when it would fit.
    """
    values = read_spec(spec, overrides)
    if ranks is not None and not suggest:
        raise CommandError(
            "--ranks goes with --suggest; a plan has the ranks of its degrees"
        )
    with connect(url, token, data_dir) as client:
        answer = (
            client.suggest(values, hardware=hardware, ranks=ranks)
            if suggest
            else client.plan(values, hardware=hardware)
        )
    if as_json:
        print_json(answer)
    elif suggest:
        _print_suggestions(answer)
    else:
        _print_plan(answer)
    if suggest and not answer.get("data"):
        raise CommandError("no layout can be suggested", body=answer if as_json else None)
    if answer.get("problems") or answer.get("fits") is False:
        lines = [
            f"{problem.get('pointer') or '/'}: {problem.get('detail')}"
            for problem in answer.get("problems") or ()
        ]
        raise CommandError(
            "\n  ".join(["the job would not run as it is", *lines]),
            body=answer if as_json else None,
        )


def _print_plan(answer: Json) -> None:
    out = console()
    parallel = (answer.get("resolved_spec") or {}).get("parallel") or {}
    degrees = " x ".join(f"{axis}={parallel[axis]}" for axis in _AXES if axis in parallel)
    out.print(f"[bold]{answer.get('world_size', '?')} ranks[/bold]  {degrees}")
    _print_memory(answer.get("memory") or {})
    _print_traffic(answer.get("communication") or ())
    _print_time(answer)
    if answer.get("room") is not None:
        out.print(f"room for {answer['room']} ranks of this kind")
    for note in answer.get("notes") or ():
        out.print(f"[dim]{escape(str(note))}[/dim]")
    _print_ranks(answer.get("ranks") or ())


def _print_memory(memory: Json) -> None:
    if memory:
        console().print(f"[bold]memory[/bold] of the fullest rank, {memory.get('rank', 0)}")
    for name, amount in memory.items():
        if amount and name != "rank":
            words = name.replace("_bytes", "").replace("_", " ")
            console().print(
                f"  {words:24} {size(amount) if '_bytes' in name else number(amount)}"
            )


def _print_traffic(traffic: Sequence[Json]) -> None:
    if traffic:
        console().print("[bold]sent[/bold] by that rank in a step")
    for entry in traffic:
        words = f"{entry['axis']} {str(entry['kind']).replace('_', '-')}"
        console().print(
            f"  {words:24} {size(entry['bytes'])} in {number(entry['operations'])}"
        )


def _print_time(answer: Json) -> None:
    time = answer.get("time")
    share = answer.get("bubble_share")
    if time:
        rest = f"{number(time['tokens_per_s'], 0)} tokens/s, MFU {100 * time['mfu']:.1f} %"
        console().print(
            f"[bold]step[/bold] on {answer.get('hardware')}, estimated: "
            f"{_seconds(time['step_s'])}, {rest}"
        )
        for name in (
            "products",
            "attention",
            "memory",
            "communication",
            "bubble",
            "update",
        ):
            if time[f"{name}_s"]:
                console().print(f"  {name:24} {_seconds(time[f'{name}_s'])}")
    elif share:
        console().print(f"[bold]bubble[/bold] {100 * share:.1f} % of a step")


def _print_ranks(ranks: Sequence[Json]) -> None:
    rows = [
        [
            str(rank.get("rank")),
            str(rank.get("island", "-")),
            " ".join(
                f"{axis}{index}" for axis, index in (rank.get("coordinates") or {}).items()
            ),
        ]
        for rank in ranks
    ]
    print_table(["rank", "island", "coordinates"], rows[:_MOST_ROWS], empty="no rank map")
    if len(rows) > _MOST_ROWS:
        console().print(f"... and {len(rows) - _MOST_ROWS} more; --json shows all")


def _print_suggestions(answer: Json) -> None:
    out = console()
    if answer.get("data"):
        out.print(
            f"[bold]{answer.get('world_size')} ranks[/bold] of {answer.get('hardware')}, "
            "quickest first; --set takes a row's fields"
        )
    rows = []
    for entry in answer.get("data") or ():
        changes = entry["changes"]
        time = entry["time"]
        degrees = [
            str(changes.get(f"parallel.{axis}") or 1)
            for axis in ("tp", "pp", "vpp", "cp", "ep", "dp")
        ]
        recompute = (changes.get("training.recompute") or {}).get("granularity", "none")
        estimate = [
            _seconds(time["step_s"]),
            f"{100 * time['mfu']:.1f} %",
            size(entry["total_bytes_estimate"]),
        ]
        rows.append(
            [*degrees, str(changes.get("training.micro_batch_size")), recompute, *estimate]
        )
    columns = [
        "tp",
        "pp",
        "vpp",
        "cp",
        "ep",
        "dp",
        "micro",
        "recompute",
        "step",
        "MFU",
        "fullest rank",
    ]
    print_table(columns, rows, empty="no layout fits")
    for note in answer.get("notes") or ():
        out.print(f"[dim]{escape(str(note))}[/dim]")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
