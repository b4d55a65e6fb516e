"""Read-only commands: jobs, show, watch, logs, events, metrics, checkpoints, ranks."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from service.cli.commands.jobs import JobId
from service.cli.commands.log_reader import print_log
from service.cli.commands.show import EVENT_COLUMNS, event_style, show, step_of
from service.cli.commands.watch import watch_job
from service.cli.connection import DataDir, Token, Url, connect
from service.cli.output import (
    AsJson,
    Column,
    coordinates,
    duration,
    nested,
    number,
    print_page,
    size,
)

_METRICS = "loss,grad_norm,lr,tokens_per_s"
_PAGE = 100


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    # The order in which `--help` lists them.
    for command in (jobs, show, watch, logs, events, metrics, checkpoints, ranks):
        app.command(command.__name__)(command)


def jobs(
    limit: Annotated[
        int, typer.Option(min=1, help="Maximum number of jobs, newest first.")
    ] = 20,
    status: Annotated[
        str | None, typer.Option(help="Only jobs with this status. Default: all.")
    ] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List jobs."""
    with connect(url, token, data_dir) as client:

        def fetch(after: str | None, page_size: int) -> dict[str, Any]:
            # A page's size differs from --limit: the service caps it.
            return client.jobs(limit=page_size, after=after, status=status)

        page = _pages(fetch, limit)
    columns: dict[str, Column] = {
        "id": lambda job: str(job["id"]),
        "name": lambda job: str(job.get("name")),
        "status": lambda job: str(job["status"]),
        "step": step_of,
        "loss": lambda job: number(nested(job, "progress.loss")),
        "age": _age,
    }
    print_page(
        page,
        as_json,
        columns,
        empty="no jobs yet; submit one with `megatron-ray submit SPEC`",
    )


def watch(
    job_id: JobId,
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
    """Follow a job to its end. Exit code 0 only when it succeeds."""
    with connect(url, token, data_dir) as client:
        watch_job(client, job_id, as_json=as_json, verbose=verbose)


def logs(
    job_id: JobId,
    rank: Annotated[int, typer.Option(min=0, help="Rank whose log to print.")] = 0,
    attempt: Annotated[
        int | None,
        typer.Option(min=1, help="Attempt whose log to print. Default: newest."),
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
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of events.")] = 1000,
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

        page = _pages(fetch, limit)
    print_page(page, as_json, EVENT_COLUMNS, empty="no events", style=event_style)


def metrics(
    job_id: JobId,
    keys: Annotated[str, typer.Option(help="Comma-separated names of metrics.")] = _METRICS,
    from_step: Annotated[
        int | None, typer.Option(min=0, help="First step. Default: the job's first.")
    ] = None,
    max_points: Annotated[
        int | None,
        typer.Option(
            min=1, help="Thin out to at most this many rows. Default: no thinning."
        ),
    ] = None,
    attempt: Annotated[
        int | None,
        typer.Option(
            min=1, help="Only this attempt. Default: the newest that ran each step."
        ),
    ] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List a job's metrics by step."""
    with connect(url, token, data_dir) as client:
        page = client.metrics(
            job_id, keys=keys, from_step=from_step, max_points=max_points, attempt=attempt
        )
    # A step may have been run by several attempts, so each row names its own.
    columns: dict[str, Column] = {
        "step": lambda row: str(row["step"]),
        "attempt": lambda row: str(row.get("attempt")),
    }
    for key in keys.split(","):
        name = key.strip()
        if name:
            columns[name] = _metric_column(name)
    print_page(page, as_json, columns, empty="no metrics yet")


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
    columns: dict[str, Column] = {
        "step": lambda entry: str(entry["step"]),
        "attempt": lambda entry: str(entry["attempt"]),
        "loss": lambda entry: number(entry.get("loss")),
        "size": lambda entry: size(entry.get("bytes")),
        "path": lambda entry: str(entry["path"]),
    }
    print_page(page, as_json, columns, empty="no committed checkpoint yet")


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
    columns: dict[str, Column] = {
        "rank": lambda entry: str(entry["rank"]),
        "slot": lambda entry: str(entry.get("slot")),
        "address": lambda entry: str(entry.get("address")),
        "gpu": _gpu,
        "pid": lambda entry: str(entry.get("pid")),
        "coordinates": coordinates,
    }
    print_page(page, as_json, columns, empty="no ranks yet")


def _pages(
    fetch: Callable[[str | None, int], dict[str, Any]], limit: int
) -> dict[str, Any]:
    """Returns up to `limit` entries as one page; `fetch` gets (after, page size)."""
    entries: list[Any] = []
    after: str | None = None
    while True:
        page = fetch(after, min(_PAGE, limit - len(entries)))
        entries += page["data"]
        # A page without entries ends the loop even if it claims that there are more.
        if not page.get("has_more") or len(entries) >= limit or not page["data"]:
            break
        after = page.get("last_id") or str(page["data"][-1]["id"])
    # One page that spans all that were fetched.
    merged = {**page, "data": entries, "first_id": None, "last_id": None}
    if entries:
        merged["first_id"] = str(entries[0]["id"])
        merged["last_id"] = str(entries[-1]["id"])
    return merged


def _age(job: Mapping[str, Any]) -> str:
    # By this machine's clock, which may differ from the service's.
    try:
        created = datetime.fromisoformat(str(job.get("created_at")))
    except ValueError:
        return "-"
    return duration((datetime.now(UTC) - created).total_seconds())


def _gpu(entry: Mapping[str, Any]) -> str:
    # GPU 0 is a GPU: `or` would drop it.
    if entry.get("gpu") is None:
        return "-"
    return str(entry["gpu"])


def _metric_column(name: str) -> Column:
    # A function, so that each column keeps its own name: a lambda in the loop would
    # read the last one.
    return lambda row: _metric(row.get(name))


def _metric(value: Any) -> str:
    # Some metrics have parts: the split of a step's time, the other losses.
    if isinstance(value, dict):
        return ", ".join(f"{name} {_metric(part)}" for name, part in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return number(value)
