"""Commands that show jobs.

The last line of a shortened answer names what is missing. Must not know: how a job is
created or changed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from service.cli.choice import (
    JobChoice,
    JobId,
    JobName,
    Labels,
    SomeJobIds,
    Statuses,
    labels,
    read_pages,
    statuses,
)
from service.cli.commands.clusters import nodes
from service.cli.commands.metrics import metrics
from service.cli.commands.show import EVENT_COLUMNS, absence, event_style, show, step_of
from service.cli.commands.watch import watch_jobs
from service.cli.connection import DataDir, Token, Url, connect
from service.cli.log_reader import print_log
from service.cli.numbers import at_least
from service.cli.output import (
    AsJson,
    Column,
    age,
    coordinates,
    moment,
    nested,
    number,
    print_note,
    print_page,
    size,
)
from service.client import Client
from workers.protocol.states import JobState

_HOLDING = [state.value for state in JobState if state.holds_resources]
_ENDED = [state.value for state in JobState if state.is_terminal]
_WAITING = [state.value for state in JobState if state.value not in (*_HOLDING, *_ENDED)]
_JOB_GROUPS = (_HOLDING, _WAITING, _ENDED)
"""States of jobs in the order in which `jobs` lists them."""


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    # The order in which `--help` lists them.
    reading = (jobs, show, watch, logs, events, metrics, checkpoints, attempts, ranks)
    for command in reading:
        app.command(command.__name__)(command)
    nodes.register(app)


def jobs(
    limit: Annotated[
        int, typer.Option(parser=at_least(1), help="Maximum number of jobs.")
    ] = 20,
    status: Statuses = None,
    name: JobName = None,
    metadata: Labels = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List jobs: those that run first, then those that wait, then those that have ended."""
    chosen = JobChoice(statuses(status), name, labels(metadata))
    with connect(url, token, data_dir) as client:
        page = _active_first(client, chosen, limit)
    columns: dict[str, Column] = {
        "id": lambda job: str(job["id"]),
        "name": lambda job: str(job.get("name")),
        "status": lambda job: str(job["status"]),
        "step": step_of,
        "loss": lambda job: number(nested(job, "progress.loss")),
        "age": lambda job: age(job.get("created_at")),
    }
    empty = "no jobs yet; submit one with `megatron-ray submit SPEC`"
    if status or name or metadata:
        empty = "no job matches"
    print_page(page, as_json, columns, empty=empty)
    if page["has_more"] and not as_json:
        total = page["total"]
        num_more = total - len(page["data"])
        print_note(f"{num_more} more; show all {total} with --limit {total}")


def _active_first(client: Client, chosen: JobChoice, limit: int) -> dict[str, Any]:
    """Returns up to `limit` jobs as one page: those that hold ranks come first."""
    entries: list[Any] = []
    total = 0
    for group in _JOB_GROUPS:
        states = [state for state in group if state in (chosen.statuses or group)]
        if not states:
            continue
        # Of a group beyond the limit one job is read, because its page has the number.
        room = max(1, limit - len(entries))
        page = replace(chosen, statuses=states).read(client, room)
        total += page["total"]
        entries += page["data"][: limit - len(entries)]
    merged = {"object": "list", "data": entries, "first_id": None, "last_id": None}
    if entries:
        merged["first_id"] = entries[0]["id"]
        merged["last_id"] = entries[-1]["id"]
    return {**merged, "has_more": total > len(entries), "total": total}


def watch(
    job_ids: SomeJobIds,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", help="Print every event, including those of single ranks."
        ),
    ] = False,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Follow jobs to their end. Exit code 0 only when all succeed."""
    with connect(url, token, data_dir) as client:
        watch_jobs(client, job_ids, as_json=as_json, verbose=verbose)


def logs(
    job_id: JobId,
    rank: Annotated[
        int, typer.Option(parser=at_least(0), help="Rank whose log to print.")
    ] = 0,
    attempt: Annotated[
        int | None,
        typer.Option(
            parser=at_least(1), help="Attempt whose log to print. Default: newest."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow until the job ends.")
    ] = False,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print a rank's log."""
    with connect(url, token, data_dir) as client:
        try:
            print_log(
                client, job_id, rank=rank, attempt=attempt, follow=follow, as_json=as_json
            )
        except KeyboardInterrupt:
            # Ctrl-C is the usual way to end --follow, so no message is printed.
            raise SystemExit(130) from None


def events(
    job_id: JobId,
    limit: Annotated[
        int, typer.Option(parser=at_least(1), help="Maximum number of events.")
    ] = 1000,
    level: Annotated[
        str | None,
        typer.Option(help="Only these levels, such as warn,error. Default: all."),
    ] = None,
    newest: Annotated[
        bool, typer.Option("--newest", help="Newest first. Default: oldest first.")
    ] = False,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List a job's events."""
    with connect(url, token, data_dir) as client:

        def fetch(after: str | None, page_size: int) -> dict[str, Any]:
            return client.events(
                job_id, limit=page_size, after=after, levels=level, newest_first=newest
            )

        page = read_pages(fetch, limit)
    empty = "no events"
    if level:
        empty = f"no events of level {level}"
    print_page(page, as_json, EVENT_COLUMNS, empty=empty, style=event_style)
    if page.get("has_more") and not as_json:
        total = page["total"]
        order = "newer"
        if newest:
            order = "older"
        num_more = total - len(page["data"])
        print_note(f"{num_more} {order} events; show all {total} with --limit {total}")


def _empty(client: Client, job_id: str, page: Mapping[str, Any], what: str) -> str:
    """Returns the line that stands for an empty page; nothing for one with entries."""
    if page["data"]:
        return ""
    return absence(client.show(job_id), what)


def checkpoints(
    job_id: JobId,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List a job's committed checkpoints."""
    with connect(url, token, data_dir) as client:
        page = client.checkpoints(job_id)
        empty = _empty(client, job_id, page, "no committed checkpoint")
    columns: dict[str, Column] = {
        "step": lambda entry: str(entry["step"]),
        "attempt": lambda entry: str(entry["attempt"]),
        "loss": lambda entry: number(entry.get("loss")),
        "size": lambda entry: size(entry.get("bytes")),
        "path": lambda entry: str(entry["path"]),
    }
    print_page(page, as_json, columns, empty=empty)


def ranks(
    job_id: JobId,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List where each rank of a job runs."""
    with connect(url, token, data_dir) as client:
        page = client.ranks(job_id)
        empty = _empty(client, job_id, page, "no ranks")
    columns: dict[str, Column] = {
        "rank": lambda entry: str(entry["rank"]),
        "slot": lambda entry: str(entry.get("slot")),
        "address": lambda entry: str(entry.get("address")),
        "gpu": _gpu,
        "pid": lambda entry: str(entry.get("pid")),
        "coordinates": coordinates,
    }
    # A column of its own only when there is something in it.
    if any(entry.get("slow") for entry in page["data"]):
        columns["slow"] = _slow
    print_page(page, as_json, columns, empty=empty)


def _slow(entry: Mapping[str, Any]) -> str:
    slow = entry.get("slow")
    if not slow:
        return ""
    return f"{number(slow['ratio'], 1)} times its peers, since {moment(slow['since'])}"


def attempts(
    job_id: JobId,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List a job's attempts: why each one ended."""
    with connect(url, token, data_dir) as client:
        page = client.attempts(job_id)
        empty = _empty(client, job_id, page, "no attempts")
    columns: dict[str, Column] = {
        "attempt": lambda entry: str(entry["attempt"]),
        "state": lambda entry: str(entry["state"]),
        "reason": lambda entry: str(entry.get("reason") or "-"),
        "ranks": lambda entry: str(entry.get("world_size") or "-"),
        "started": lambda entry: _moment_or_dash(entry.get("started_at")),
        "ended": lambda entry: _moment_or_dash(entry.get("ended_at")),
        "message": lambda entry: str(entry.get("message") or ""),
    }
    print_page(page, as_json, columns, empty=empty)


def _moment_or_dash(value: Any) -> str:
    if value is None:
        return "-"
    return moment(value)


def _gpu(entry: Mapping[str, Any]) -> str:
    # GPU 0 is a GPU: `or` would drop it.
    if entry.get("gpu") is None:
        return "-"
    return str(entry["gpu"])
