"""`megatron-ray plan`: how a job would run, and the fastest layouts that fit.

Must not know: how anything is estimated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.markup import escape

from megatron_ray.config.schedules.batch_sizes import batch_sizes_of
from service.cli.connection import DataDir, Token, Url, connect_if_up
from service.cli.failure import CommandError, with_field_lines
from service.cli.numbers import at_least
from service.cli.output import (
    AsJson,
    console,
    coordinates,
    number,
    print_json,
    print_table,
    size,
)
from service.cli.spec_file import Overrides, SpecFile, read_spec
from service.client import Client, ServiceError

_MAX_RANK_ROWS = 64
_AXES = ("tp", "cp", "ep", "dp", "pp")
_SUGGESTED_AXES = ("tp", "pp", "vpp", "cp", "ep", "dp")
# Field of the answer -> what people call it, in the order in which they are printed.
_TIME_PARTS = {
    "products_s": "matmuls",
    "attention_s": "attention",
    "memory_s": "memory-bound ops",
    "communication_s": "exposed communication",
    "bubble_s": "pipeline bubble",
    "update_s": "optimizer",
}
Json = Mapping[str, Any]
Hardware = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        help="Device to plan for: A100, H100, H200, B200 or CPU. Default: the cluster's.",
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
        bool,
        typer.Option("--suggest", help="List the fastest layouts that fit instead."),
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(
            parser=at_least(1),
            help="With --suggest or --hardware: number of ranks. Default: as many as the job "
            "would get.",
        ),
    ] = None,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline",
            help="Check and plan the spec alone, without a service. Default: only when no "
            "local stack is up and no --url is given.",
        ),
    ] = False,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Check a job and show how it would run, without starting it.

    Exit code 0 only when it fits. Without a service it is planned from the spec alone.
    """
    values = read_spec(spec, overrides)
    # The number would be ignored silently.
    if ranks is not None and not (suggest or hardware or offline):
        raise CommandError(
            "--ranks needs --suggest or --hardware; the ranks of a job on the cluster follow "
            "from its parallel degrees"
        )
    question = _Question(values, suggest, hardware, ranks)
    client = None
    if not offline:
        client = connect_if_up(url, token, data_dir)
    answer = question.answer_of(client, is_service_named=url is not None)
    if as_json:
        print_json(answer)
    elif suggest:
        _print_suggestions(answer)
    else:
        _print_plan(answer)
    _check_fits(answer, suggest, as_json)


@dataclass(frozen=True)
class _Question:
    """What is asked of a spec."""

    spec: Json
    suggest: bool
    hardware: str | None
    ranks: int | None

    def answer_of(self, client: Client | None, *, is_service_named: bool) -> dict[str, Any]:
        """Returns the service's answer, or without a service one from the spec alone."""
        if client is None:
            return self._from_spec()
        try:
            with client:
                return self._from_service(client)
        except ServiceError as error:
            # The record of a local stack may be older than its end.
            if is_service_named or error.code != "unreachable":
                raise
            return self._from_spec()

    def _from_service(self, client: Client) -> dict[str, Any]:
        if self.suggest:
            return client.suggest(self.spec, hardware=self.hardware, ranks=self.ranks)
        return client.plan(self.spec, hardware=self.hardware, ranks=self.ranks)

    def _from_spec(self) -> dict[str, Any]:
        # Imported here: no other command needs the estimates.
        from service.cli import offline_plan

        if self.suggest:
            return offline_plan.make_suggestions(self.spec, self.hardware, self.ranks)
        return offline_plan.make_plan(self.spec, self.hardware, self.ranks)


def _check_fits(answer: dict[str, Any], suggest: bool, as_json: bool) -> None:
    """Raises CommandError when the job has problems or does not fit."""
    # The plan is always printed, so that users see what does not fit. With --json the error
    # repeats the response; otherwise stdout already has it.
    body = None
    if as_json:
        body = answer
    if suggest and not answer.get("data"):
        raise CommandError(
            "no layout can be suggested", remedy="see the notes above", body=body
        )
    problems = answer.get("problems") or ()
    if problems or answer.get("fits") is False:
        fields: list[tuple[str, str]] = []
        for problem in problems:
            fields.append((problem.get("pointer") or "/", problem.get("detail")))
        message = "this job cannot run"
        if answer.get("fits") is False:
            message = "this job does not fit"
        raise CommandError(with_field_lines(message, fields), body=body)


def _print_plan(answer: Json) -> None:
    # Sections without data are left out: what is not known depends on spec and cluster.
    out = console()
    resolved = answer.get("resolved_spec") or {}
    parallel = resolved.get("parallel") or {}
    degrees = " x ".join(f"{axis}={parallel[axis]}" for axis in _AXES if axis in parallel)
    out.print(f"[bold]{answer.get('world_size', '?')} ranks[/bold]  {degrees}")
    _print_length(resolved.get("training") or {})
    _print_memory(answer.get("memory") or {})
    _print_checkpoints(answer)
    _print_communication(answer.get("communication") or ())
    _print_time(answer)
    if answer.get("room") is not None:
        holder = "the cluster fits"
        # A note names the nodes that have to come.
        if answer.get("new_nodes"):
            holder = "today's nodes fit"
        out.print(f"{holder} {answer['room']} such ranks")
    _print_notes(answer)
    _print_ranks(answer.get("ranks") or ())


def _print_length(training: Json) -> None:
    steps = training.get("steps")
    # Of a number of epochs it follows from the data, as a note explains.
    if steps is None:
        return
    sizes = batch_sizes_of(training)
    if sizes is None:
        return
    num_tokens = sizes.samples_after(steps) * training["seq_length"]
    console().print(
        f"[bold]{steps:,} steps[/bold] of {sizes} x {training['seq_length']} "
        f"tokens: {num_tokens:,} tokens"
    )


def _print_memory(memory: Json) -> None:
    out = console()
    if memory:
        out.print(
            f"[bold]memory[/bold] on the most loaded rank (rank {memory.get('rank', 0)})"
        )
    for name, amount in memory.items():
        if not amount or name == "rank":
            continue
        label = name.replace("_bytes", "").replace("_", " ")
        # All but the number of parameters are bytes.
        value = number(amount)
        if "_bytes" in name:
            value = size(amount)
        out.print(f"  {label:24} {value}")


def _print_checkpoints(answer: Json) -> None:
    num_bytes = answer.get("checkpoint_bytes")
    if num_bytes is None:
        return
    count = answer["num_checkpoints"]
    console().print(
        f"[bold]storage[/bold] for checkpoints: {size(num_bytes * count)} ({count} of "
        f"{size(num_bytes)}, at most at once)"
    )


def _print_communication(communication: Sequence[Json]) -> None:
    out = console()
    if communication:
        out.print("[bold]communication[/bold] of that rank per step")
    for entry in communication:
        label = f"{entry['axis']} {str(entry['kind']).replace('_', '-')}"
        noun = "calls"
        if entry["operations"] == 1:
            noun = "call"
        out.print(
            f"  {label:24} {size(entry['bytes'])} in {number(entry['operations'])} {noun}"
        )


def _print_time(answer: Json) -> None:
    out = console()
    time = answer.get("time")
    if time:
        out.print(
            f"[bold]step time[/bold] on {answer.get('hardware')}, estimated: "
            f"{_seconds(time['step_s'])}, {number(time['tokens_per_s'], 0)} tokens/s, "
            f"MFU {100 * time['mfu']:.1f} %"
        )
        for key, label in _TIME_PARTS.items():
            # Parts that take no time would only hide the others.
            if time[key]:
                out.print(f"  {label:24} {_seconds(time[key])}")
    # Without a known device there is no time, but the schedule alone gives the bubble.
    elif answer.get("bubble_share"):
        out.print(
            f"[bold]pipeline bubble[/bold] {100 * answer['bubble_share']:.1f} % of a step"
        )


def _print_notes(answer: Json) -> None:
    for note in answer.get("notes") or ():
        console().print(f"[dim]{escape(str(note))}[/dim]")


def _print_ranks(ranks: Sequence[Json]) -> None:
    # A plan may have thousands of ranks.
    rows: list[list[str]] = []
    for rank in ranks[:_MAX_RANK_ROWS]:
        island = str(rank.get("island", "-"))
        rows.append([str(rank.get("rank")), island, coordinates(rank)])
    print_table(["rank", "island", "coordinates"], rows, empty="no ranks")
    if len(ranks) > _MAX_RANK_ROWS:
        console().print(f"{len(ranks) - _MAX_RANK_ROWS} more ranks; see all with --json")


def _print_suggestions(answer: Json) -> None:
    suggestions = answer.get("data") or ()
    if suggestions:
        console().print(
            f"[bold]{answer.get('world_size')} ranks[/bold] of {answer.get('hardware')}, "
            "fastest first; apply a row with --set"
        )
    columns = [
        *_SUGGESTED_AXES,
        "micro batch",
        "recompute",
        "step",
        "MFU",
        "memory per rank",
    ]
    rows: list[list[str]] = []
    for suggestion in suggestions:
        rows.append(_suggestion_row(suggestion))
    print_table(columns, rows, empty="no layouts")
    _print_notes(answer)


def _suggestion_row(suggestion: Json) -> list[str]:
    changes = suggestion["changes"]
    time = suggestion["time"]
    # A degree of 1 is left out of the changes.
    row = [str(changes.get(f"parallel.{axis}") or 1) for axis in _SUGGESTED_AXES]
    recompute = changes.get("training.recompute") or {}
    row.append(str(changes.get("training.micro_batch_size")))
    row.append(recompute.get("granularity", "none"))
    row.append(_seconds(time["step_s"]))
    row.append(f"{100 * time['mfu']:.1f} %")
    row.append(size(suggestion["total_bytes_estimate"]))
    return row


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1000 * value:.1f} ms"
