"""Runs a job without Ray and without a service, started by torchrun.

Owns: the command line of one rank, its options and exit codes.

    torchrun --standalone --nproc-per-node 2 -m workers.rank job.yaml
        --set parallel.tp=2 --reports reports.jsonl [--resume]
"""

from pathlib import Path
from typing import Annotated

import typer

from megatron_ray.storage.errors import StorageError
from megatron_ray.training.step_reporter import NonFiniteLossError
from workers.rank.messages import UserError
from workers.standalone import run_standalone

EXIT_FAILED = 1
EXIT_USER_ERROR = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    job: Annotated[Path, typer.Argument(help="Job spec, YAML or JSON.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Override of the spec, path.to.field=value; may be repeated."
        ),
    ] = None,
    reports: Annotated[
        Path | None,
        typer.Option(help="File for rank 0's step reports, one JSON object per line."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            help="Resume from the newest committed checkpoint under storage.path."
        ),
    ] = False,
) -> None:
    """Train a job without Ray and without a service, one process per rank.

    Exit codes: 0 when trained, 1 when training failed, 2 for an error in the job or the
    options.
    """
    try:
        result = run_standalone(job, set_ or [], reports, resume)
    except UserError as error:
        # The text is empty on all ranks but one, so that the message appears once.
        if str(error):
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_USER_ERROR) from None
    except (NonFiniteLossError, StorageError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from None
    # Only rank 0 returns a summary.
    if result is not None:
        typer.echo(result)


if __name__ == "__main__":
    app(prog_name="python -m workers.rank")
