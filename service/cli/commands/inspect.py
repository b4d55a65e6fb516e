"""Commands that only look: jobs, watch, logs, events, metrics, checkpoints, ranks.

They change nothing.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from service.cli.commands.jobs import JobId
from service.cli.commands.show import EVENT_COLUMNS, event_style, show, step_of
from service.cli.commands.watch import TERMINAL, watch_job
from service.cli.connection import DataDir, Token, Url, connect
from service.cli.failure import CommandError
from service.cli.output import (
    AsJson,
    Column,
    duration,
    nested,
    number,
    print_json_line,
    print_page,
    size,
)
from service.client import Client

_LOG_POLL_S = 0.5
_METRICS = "loss,grad_norm,lr,tokens_per_s"
_PAGE = 100


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    for command in (jobs, show, watch, logs, events, metrics, checkpoints, ranks):
        app.command(command.__name__)(command)


def jobs(
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    status: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List jobs."""
    with connect(url, token, data_dir) as client:
        page = _pages(
            lambda after, size: client.jobs(limit=size, after=after, status=status), limit
        )
    columns: dict[str, Column] = {
        "id": lambda job: str(job["id"]),
        "name": lambda job: str(job.get("name")),
        "status": lambda job: str(job["status"]),
        "step": step_of,
        "loss": lambda job: number(nested(job, "progress.loss")),
        "age": _ago,
    }
    print_page(
        page, as_json, columns, empty="no jobs yet; `megatron-ray submit SPEC` makes one"
    )


def watch(
    job_id: JobId,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Follow a job to its end, live. Exit code 0 only when it succeeds."""
    with connect(url, token, data_dir) as client:
        watch_job(client, job_id, as_json=as_json)


def logs(
    job_id: JobId,
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="The newest when not given.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print a rank's log."""
    with connect(url, token, data_dir) as client:
        try:
            _print_log(
                client, job_id, rank=rank, attempt=attempt, follow=follow, as_json=as_json
            )
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def events(
    job_id: JobId,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 1000,
    level: Annotated[
        str | None, typer.Option(help="Only these levels, such as warn,error.")
    ] = None,
    newest: Annotated[
        bool, typer.Option("--newest", help="The newest ones first; else the oldest.")
    ] = False,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print a job's history."""
    with connect(url, token, data_dir) as client:
        page = _pages(
            lambda after, size: client.events(
                job_id, limit=size, after=after, levels=level, newest_first=newest
            ),
            limit,
        )
    print_page(page, as_json, EVENT_COLUMNS, empty="no events", style=event_style)


def metrics(
    job_id: JobId,
    keys: Annotated[str, typer.Option(help="Comma-separated names.")] = _METRICS,
    from_step: Annotated[int | None, typer.Option(min=0, help="First step.")] = None,
    max_points: Annotated[
        int | None, typer.Option(min=1, help="Thin out to this many rows.")
    ] = None,
    attempt: Annotated[
        int | None,
        typer.Option(min=1, help="Only this attempt; the newest per step when not given."),
    ] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print a job's metrics by step."""
    with connect(url, token, data_dir) as client:
        page = client.metrics(
            job_id, keys=keys, from_step=from_step, max_points=max_points, attempt=attempt
        )
    names = [name.strip() for name in keys.split(",") if name.strip()]
    columns: dict[str, Column] = {
        "step": lambda row: str(row["step"]),
        "attempt": lambda row: str(row.get("attempt")),
    }
    columns |= {name: lambda row, name=name: _cell(row.get(name)) for name in names}  # type: ignore[misc]
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
    """Show which rank runs where."""
    with connect(url, token, data_dir) as client:
        page = client.ranks(job_id)
    columns: dict[str, Column] = {
        "rank": lambda entry: str(entry["rank"]),
        "slot": lambda entry: str(entry.get("slot")),
        "address": lambda entry: str(entry.get("address")),
        "gpu": lambda entry: str(entry.get("gpu") if entry.get("gpu") is not None else "-"),
        "pid": lambda entry: str(entry.get("pid")),
        "coordinates": lambda entry: " ".join(
            f"{axis}{index}" for axis, index in (entry.get("coordinates") or {}).items()
        ),
    }
    print_page(page, as_json, columns, empty="no ranks yet")


def _pages(
    fetch: Callable[[str | None, int], dict[str, Any]], limit: int
) -> dict[str, Any]:
    """Up to `limit` entries, over as many pages as that takes."""
    data: list[Any] = []
    after: str | None = None
    while True:
        page = fetch(after, min(_PAGE, limit - len(data)))
        data += page["data"]
        more = bool(page.get("has_more"))
        if not more or len(data) >= limit or not page["data"]:
            return {
                **page,
                "data": data,
                "first_id": _id(data[0]) if data else None,
                "last_id": _id(data[-1]) if data else None,
            }
        after = page.get("last_id") or _id(page["data"][-1])


def _id(entry: Mapping[str, Any]) -> str:
    return str(entry["id"])


@dataclass
class _LogReader:
    """Reads one rank's log piece by piece, from one attempt into the next when none was
    asked for.
    """

    client: Client
    job_id: str
    rank: int
    attempt: int | None
    newest: bool = True
    offset: int = 0
    wrote: bool = False

    def read(self, as_json: bool) -> bool:
        """Prints all there is; whether the job had ended before (what is written later
        is then none).
        """
        job = self.client.show(self.job_id)
        current = int(job.get("attempt") or 0)
        if self.attempt is None or (self.newest and current > self.attempt):
            if self.attempt:
                self._drain(as_json)
            self.attempt = current or None
            self.offset = 0
        if self.attempt:
            self._drain(as_json)
        return job["status"] in TERMINAL

    def _drain(self, as_json: bool) -> None:
        while True:
            piece = self.client.logs(
                self.job_id, rank=self.rank, attempt=self.attempt, offset=self.offset
            )
            text = str(piece.get("data") or "")
            offset = int(piece.get("next_offset") or self.offset)
            if offset <= self.offset:
                return
            self.offset = offset
            self.wrote = True
            if as_json:
                print_json_line(piece)
            else:
                sys.stdout.write(text)
                sys.stdout.flush()


def _print_log(
    client: Client,
    job_id: str,
    *,
    rank: int,
    attempt: int | None,
    follow: bool,
    as_json: bool,
) -> None:
    reader = _LogReader(client, job_id, rank, attempt, newest=attempt is None)
    while not reader.read(as_json) and follow:
        time.sleep(_LOG_POLL_S)
    if not reader.wrote:
        raise CommandError(
            f"rank {rank} of {job_id} has written no log yet",
            remedy=f"`megatron-ray show {job_id}` says where the job is",
        )


def _ago(job: Mapping[str, Any]) -> str:
    try:
        created = datetime.fromisoformat(str(job.get("created_at")))
    except ValueError:
        return "-"
    return duration((datetime.now(UTC) - created).total_seconds())


def _cell(value: Any) -> str:
    if isinstance(value, dict):  # the split of a step, or other losses
        return ", ".join(f"{name} {_cell(part)}" for name, part in value.items()) or "-"
    return f"{value:.6g}" if isinstance(value, float) else number(value)
