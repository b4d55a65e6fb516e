"""Commands that create or change a job: submit, checkpoint-now, delete.

Must not know: how a job is followed or displayed.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from service.cli import ray_job
from service.cli.choice import JobId, SomeJobIds
from service.cli.commands.watch import TERMINAL, watch_job
from service.cli.connection import DataDir, Token, Url, connect
from service.cli.failure import CommandError
from service.cli.output import AsJson, console, print_json
from service.cli.spec_file import Overrides, SpecFile, read_spec
from service.cli.spec_parsing import parse_spec
from service.client import Client, ServiceError

_POLL_S = 0.3


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    app.command("submit")(submit)
    app.command("checkpoint-now")(checkpoint_now)
    app.command("delete")(delete)


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
    rayjob: Annotated[
        Path | None,
        typer.Option(
            help="Template of a RayJob. Prints the RayJob that makes this job's cluster, for "
            "`kubectl apply -f -`."
        ),
    ] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Submit a job."""
    values = read_spec(spec, overrides)
    manifest = None
    if rayjob is not None:
        if watch or as_json:
            raise CommandError(
                "--rayjob prints a manifest",
                remedy="leave --watch and --json out",
                exit_code=2,
            )
        # Before the job is created: a wrong template leaves no trace.
        manifest = ray_job.render(rayjob, parse_spec(values))
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
        elif manifest is not None:
            typer.echo(manifest, nl=False)
            typer.echo(
                f"submitted {job['id']}; it starts once its RayJob is there", err=True
            )
            _print_warnings(client, job["id"])
        else:
            console().print(
                f"submitted [bold]{job_id}[/bold]; follow it with "
                f"`megatron-ray watch {job_id}`"
            )
            _print_warnings(client, job["id"])


def _print_warnings(client: Client, job_id: str) -> None:
    """Prints what the service has noted about a spec that it has accepted."""
    noted = client.events(job_id, types="job.created,spec.warning", levels="warn")
    for event in noted["data"]:
        typer.echo(f"warning: {event['message']}", err=True)


def checkpoint_now(
    job_id: JobId,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until it is committed.")
    ] = True,
    timeout_s: Annotated[float, typer.Option(help="Maximum wait, in seconds.")] = 600.0,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint of a running job now."""
    with connect(url, token, data_dir) as client:
        last_event = client.events(job_id, newest_first=True, limit=1)["last_id"]
        job = client.checkpoint(job_id)
        if wait:
            job = _wait_for_checkpoint(client, job_id, last_event, timeout_s)
    if as_json:
        print_json(job)
    elif wait:
        checkpoint = job["last_checkpoint"]
        console().print(
            f"checkpoint of step {checkpoint['step']} committed: {escape(checkpoint['path'])}"
        )
    else:
        console().print(f"checkpoint of {escape(job_id)} requested")


def _wait_for_checkpoint(
    client: Client, job_id: str, last_event: str | None, timeout_s: float
) -> dict[str, Any]:
    """Returns the job once a checkpoint is committed after `last_event`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        page = client.events(job_id, types="checkpoint.committed", after=last_event)
        job = client.show(job_id)
        if page["data"]:
            return job
        if job["status"] in TERMINAL:
            raise CommandError(
                f"{job_id} {job['status']} before a checkpoint was committed", body=job
            )
        time.sleep(_POLL_S)
    raise CommandError(
        f"no checkpoint was committed in {timeout_s:.0f} s",
        remedy=f"the request stays; see `megatron-ray events {job_id}`",
    )


def delete(
    job_ids: SomeJobIds,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask before jobs are deleted.")
    ] = False,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Delete ended jobs and their history. Files that they wrote stay."""
    ids = list(dict.fromkeys(job_ids))
    if not yes:
        _ask_to_delete(ids)
    deleted = []
    errors = []
    with connect(url, token, data_dir) as client:
        for job_id in ids:
            try:
                client.delete(job_id)
            except ServiceError as error:
                # The others are deleted all the same.
                errors.append(f"{job_id}: {error.detail}")
            else:
                deleted.append(job_id)
    body = {"deleted": deleted, "errors": errors}
    if as_json and not errors:
        print_json(body)
    elif not as_json:
        for job_id in deleted:
            console().print(f"{escape(job_id)} deleted; its files stay")
    if errors:
        raise CommandError("\n".join(errors), body=body)


def _ask_to_delete(job_ids: list[str]) -> None:
    if not sys.stdin.isatty():
        raise CommandError(
            "nothing was deleted",
            remedy="add --yes to delete without a question",
            exit_code=2,
        )
    # On stderr: with --json, stdout is JSON alone.
    if not typer.confirm(f"delete {', '.join(job_ids)} with the history?", err=True):
        raise CommandError("nothing was deleted")
