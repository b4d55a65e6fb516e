"""The command line of one rank without Ray and without a service, started by torchrun.

Owns: its options and exit codes.

torchrun --standalone --nproc-per-node 2 -m workers.rank job.yaml --set parallel.tp=2
--reports reports.jsonl [--resume]
"""

from pathlib import Path
from typing import Annotated

import typer

from megatron_ray.training.step_reporter import NonFiniteLossError
from workers.rank.messages import UserError
from workers.standalone import run_standalone


def main(
    job: Annotated[Path, typer.Argument(help="Job spec, YAML or JSON.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="path.to.field=value over the spec; may be repeated."),
    ] = None,
    reports: Annotated[
        Path | None,
        typer.Option(help="File for rank 0's step reports, one JSON object a line."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(help="Go on from the newest committed checkpoint under storage.path."),
    ] = False,
) -> None:
    """Trains a job without Ray and without a service: one process per rank, started by
    torchrun.
    """
    try:
        outcome = run_standalone(job, set_ or [], reports, resume)
    except UserError as mistake:
        if str(mistake):
            typer.echo(f"error: {mistake}", err=True)
        raise typer.Exit(2) from None
    except NonFiniteLossError as problem:
        typer.echo(f"error: {problem}", err=True)
        raise typer.Exit(1) from None
    if outcome is not None:
        typer.echo(outcome)


if __name__ == "__main__":
    typer.run(main)
