"""`megatron-ray profile`: where the time and memory of a running job's steps go.

Must not know: how ranks are profiled.
"""

import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape

from service.cli.choice import JobId
from service.cli.connection import DataDir, Token, Url, connect
from service.cli.failure import CommandError
from service.cli.numbers import at_least
from service.cli.output import (
    AsJson,
    Column,
    console,
    moment,
    nested,
    print_json,
    print_note,
    print_page,
)
from service.client import Client

_POLL_S = 0.5
Json = Mapping[str, Any]


def register(app: typer.Typer) -> None:
    """Adds this command."""
    app.command("profile")(profile)


def rank_numbers(text: str) -> list[int]:
    """Returns the ranks of `0,3`. Raises typer.BadParameter."""
    ranks = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise typer.BadParameter(f"{text[:80]!r} are no ranks; write them as 0,3")
        ranks.append(int(part))
    return ranks


def profile(
    job_id: JobId,
    steps: Annotated[
        str | None,
        typer.Option(
            help="First and last step, such as 10-12. Default: list the job's profiles."
        ),
    ] = None,
    ranks: Annotated[
        str, typer.Option(help="Comma-separated ranks that record them.")
    ] = "0",
    timeout_s: Annotated[
        int, typer.Option("--timeout", parser=at_least(1), help="Seconds to wait for it.")
    ] = 600,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Record coming steps of a running job: a trace of every operator, and the memory.

    The files are written to the job's storage. Ranks that are recorded take longer, and the
    others wait for them.
    """
    with connect(url, token, data_dir) as client:
        if steps is None:
            _print_list(client.profiles(job_id), as_json=as_json)
            return
        requested = client.request_profile(job_id, steps, rank_numbers(ranks))
        if not as_json:
            job = client.show(job_id)
            print_note(
                f"requested; the job has done {nested(job, 'progress.step') or 0} steps"
            )
        written = _awaited(client, job_id, requested, timeout_s)
    if as_json:
        print_json(written)
    else:
        _print(written)
    problems = _problems(written)
    if problems:
        raise CommandError(
            f"no files of {'; '.join(problems)}",
            remedy="ask for later steps, or look at `megatron-ray events` and `logs`",
        )


def _awaited(client: Client, job_id: str, requested: Json, timeout_s: float) -> Json:
    """Waits until every rank has reported. Raises CommandError when they do not."""
    deadline = time.monotonic() + timeout_s
    while True:
        for entry in client.profiles(job_id)["data"]:
            if entry["id"] == requested["id"] and entry["status"] != "pending":
                written: Json = entry
                return written
        if time.monotonic() > deadline:
            job = client.show(job_id)
            raise CommandError(
                f"steps {_steps(requested)} of {job_id} are not recorded within {timeout_s} s; "
                f"the job is {job['status']} and has done "
                f"{nested(job, 'progress.step') or 0} steps",
                remedy=f"the request stands: `megatron-ray profile {job_id}` lists its files",
            )
        time.sleep(_POLL_S)


def _print_list(page: Json, *, as_json: bool) -> None:
    columns: dict[str, Column] = {
        "requested": lambda entry: moment(entry["created_at"]),
        "attempt": lambda entry: str(entry["attempt"]),
        "steps": _steps,
        "ranks": lambda entry: ", ".join(map(str, entry["ranks"])),
        "status": lambda entry: str(entry["status"]),
        "files": lambda entry: "; ".join(_problems(entry)) or str(entry["folder"]),
    }
    empty = "no profiles; --steps 10-12 requests one of coming steps"
    print_page(page, as_json, columns, empty=empty)


def _print(entry: Json) -> None:
    out = console()
    out.print(f"[bold]{escape(str(entry['job_id']))}[/bold] attempt ", end="")
    out.print(f"{entry['attempt']}, steps {_steps(entry)}")
    columns: dict[str, Column] = {
        "operator": lambda row: str(row["name"]),
        "calls": lambda row: str(row["calls"]),
        "own time": lambda row: f"{row['seconds'] * 1e3:.2f} ms",
        "share": lambda row: f"{row['share']:.1%}",
    }
    for report in entry["reports"]:
        for name in report["files"]:
            out.print(f"  {escape(entry['folder'])}/{escape(name)}")
    for report in entry["reports"]:
        if report["operators"]:
            out.print(f"[bold]rank {report['rank']}[/bold], {report['seconds']:.3f} s")
            print_page({"data": report["operators"]}, False, columns, empty="")


def _steps(entry: Json) -> str:
    if entry["first_step"] == entry["last_step"]:
        return str(entry["first_step"])
    return f"{entry['first_step']}-{entry['last_step']}"


def _problems(entry: Json) -> list[str]:
    problems = []
    for report in entry["reports"]:
        if report.get("problem"):
            problems.append(f"rank {report['rank']}: {report['problem']}")
    return problems
