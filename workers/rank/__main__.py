"""Runs a job without Ray and without a service, started by torchrun or srun.

Owns: the command line of one rank, its options and exit codes.

    torchrun --standalone --nproc-per-node 2 -m workers.rank job.yaml
        --set parallel.tp=2 --reports reports.jsonl [--resume]
"""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from workers.rank.messages import UserError
from workers.standalone import EXIT_USER_ERROR, TrainingFailedError, run_standalone

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

    SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2 ends the run after a checkpoint, a second
    signal at once. Exit codes: 0 when trained, 1 when training failed, 2 for an error in the
    job, its files or the options, 75 when ended at training.max_duration_s or
    training.exit_every_steps, 128 + its number when stopped by a signal (143 for SIGTERM,
    130 for SIGINT).
    """
    try:
        ending = run_standalone(
            job, set_ or [], reports, resume=resume, notify=_echo_to_stderr
        )
    except UserError as error:
        _fail(str(error), EXIT_USER_ERROR)
    except TrainingFailedError as error:
        _fail(str(error), error.exit_code)
    # Only rank 0 has a summary.
    if ending.message is not None:
        typer.echo(ending.message)
    raise typer.Exit(ending.exit_code)


def _echo_to_stderr(line: str) -> None:
    typer.echo(line, err=True)


def _fail(message: str, exit_code: int) -> NoReturn:
    # The text is empty on all ranks but one, so that the message appears once.
    if message:
        typer.echo(f"error: {message}", err=True)
    raise typer.Exit(exit_code) from None


if __name__ == "__main__":
    app(prog_name="python -m workers.rank")
