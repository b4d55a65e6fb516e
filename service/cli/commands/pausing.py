"""Commands that pause, resume and resize jobs.

Must not know: how a job is followed or displayed.
"""

from typing import Annotated

import typer
from rich.markup import escape

from service.cli.choice import JobId
from service.cli.commands.watch import watch_job
from service.cli.connection import DataDir, Token, Url, connect
from service.cli.numbers import at_least
from service.cli.output import AsJson, console, print_json, styled_status
from service.cli.spec_file import Overrides, override


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    app.command("pause")(pause)
    app.command("resume")(resume)
    app.command("resize")(resize)


def pause(
    job_id: JobId,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Pause a job: it writes a checkpoint and releases its resources."""
    with connect(url, token, data_dir) as client:
        job = client.pause(job_id)
    if as_json:
        print_json(job)
        return
    line = f"{escape(job_id)} {styled_status('paused')}"
    if job["status"] != "paused":
        line = f"{escape(job_id)} is being paused"
    console().print(f"{line}; resume it with `megatron-ray resume {escape(job_id)}`")


def resume(
    job_id: JobId,
    overrides: Overrides = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Follow the job to its end. Exit code 0 only when it succeeds."
        ),
    ] = False,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Resume a paused, cancelled, failed or finished job from its newest checkpoint.

    `--set training.steps=2000` gives a finished job more steps. What changes its learning
    rate, samples or model must also be named: `--set
    checkpoint.resume_changes=[training.steps]`.
    """
    changes = override({}, overrides)
    with connect(url, token, data_dir) as client:
        job = client.resume(job_id, changes)
        if watch:
            watch_job(client, job_id, as_json=as_json)
        elif as_json:
            print_json(job)
        else:
            console().print(
                f"resumed {escape(job_id)}; follow it with `megatron-ray watch "
                f"{escape(job_id)}`"
            )


def resize(
    job_id: JobId,
    dp: Annotated[
        int,
        typer.Option("--dp", parser=at_least(1), help="Number of data-parallel replicas."),
    ],
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Change a job's number of replicas: it goes on from a checkpoint with the same batches."""
    with connect(url, token, data_dir) as client:
        job = client.resize(job_id, dp)
    if as_json:
        print_json(job)
        return
    console().print(
        f"{escape(job_id)} goes on with dp={dp}; follow it with `megatron-ray watch "
        f"{escape(job_id)}`"
    )
