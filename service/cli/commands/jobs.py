"""Commands that create or change a job: submit, cancel.

Must not know: how a job is followed or displayed.
"""

import time
from typing import Annotated, Any

import typer
from rich.markup import escape

from service.cli.commands.watch import TERMINAL, watch_job
from service.cli.connection import DataDir, Token, Url, connect
from service.cli.failure import CommandError
from service.cli.output import AsJson, console, print_json, styled_status
from service.cli.spec_file import Overrides, SpecFile, read_spec
from service.client import Client

JobId = Annotated[
    str,
    typer.Argument(help="Job id, as listed by `megatron-ray jobs`.", show_default=False),
]
_POLL_S = 0.3


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    app.command("submit")(submit)
    app.command("cancel")(cancel)


def submit(
    spec: SpecFile,
    overrides: Overrides = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Follow the job to its end. Exit code 0 only when it succeeds."
        ),
    ] = False,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            help="Submitting again with the same key returns the same job. Default: random."
        ),
    ] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Submit a job."""
    values = read_spec(spec, overrides)
    with connect(url, token, data_dir) as client:
        job = client.submit(values, idempotency_key)
        job_id = escape(job["id"])
        if watch:
            # With --json, stdout contains only the events.
            if not as_json:
                name = escape(str(job.get("name")))
                console().print(f"submitted [bold]{job_id}[/bold] ({name})")
            watch_job(client, job["id"], as_json=as_json)
        elif as_json:
            print_json(job)
        else:
            console().print(
                f"submitted [bold]{job_id}[/bold]; follow it with "
                f"`megatron-ray watch {job_id}`"
            )
            _print_warnings(client, job["id"])


def _print_warnings(client: Client, job_id: str) -> None:
    """Prints what the service has noted about a spec that it has accepted."""
    for event in client.events(job_id, types="spec.warning")["data"]:
        typer.echo(f"warning: {event['message']}", err=True)


def cancel(
    job_id: JobId,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the job has ended.")
    ] = True,
    timeout_s: Annotated[float, typer.Option(help="Maximum wait, in seconds.")] = 180.0,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Cancel a job after a final checkpoint."""
    with connect(url, token, data_dir) as client:
        job = client.cancel(job_id)
        # The request returns before the final checkpoint is written.
        if wait:
            job = _wait_for_end(client, job, timeout_s)
    status = str(job["status"])
    # A job that ended otherwise is reported below, as an error.
    if as_json:
        print_json(job)
    elif status not in TERMINAL or status == "cancelled":
        console().print(f"{escape(job_id)} {styled_status(status)}")
    # The job may finish before the cancellation takes effect.
    if status in ("succeeded", "failed"):
        raise CommandError(f"{job_id} {status} before it could be cancelled", body=job)
    if wait and status != "cancelled":
        raise CommandError(
            f"{job_id} is still {status} after {timeout_s:.0f} s",
            remedy=f"see `megatron-ray events {job_id}`",
            body=job,
        )


def _wait_for_end(client: Client, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    # Polled rather than streamed: this wait has a deadline.
    deadline = time.monotonic() + timeout_s
    while job["status"] not in TERMINAL and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        job = client.show(str(job["id"]))
    return job
