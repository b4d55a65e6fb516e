"""Commands that only look: jobs, show, watch, logs, events, metrics, checkpoints, ranks. They change nothing."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.markup import escape

from service.cli.connection import DataDir, Token, Url, connect
from service.cli.failure import Failure
from service.cli.jobs import JobId
from service.cli.output import AsJson, console, duration, nested, number, print_json, print_json_line, print_table, size, styled_status
from service.cli.watching import TERMINAL, watch_job
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
        page = _pages(lambda after, size: client.jobs(limit=size, after=after, status=status), limit)
    if as_json:
        print_json(page)
        return
    rows = [
        [job["id"], str(job.get("name")), job["status"], _step(job), number(nested(job, "progress.loss")), _ago(job)]
        for job in page["data"]
    ]
    print_table(["id", "name", "status", "step", "loss", "age"], rows, empty="no jobs yet; `megatron-ray submit SPEC` makes one")


def show(job_id: JobId, url: Url = None, token: Token = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show one job."""
    with connect(url, token, data_dir) as client:
        job = client.show(job_id)
    if as_json:
        print_json(job)
        return
    out, progress = console(), job.get("progress") or {}
    out.print(f"[bold]{escape(job['id'])}[/bold] {escape(str(job.get('name')))}  {styled_status(job['status'])}")
    reason = " ".join(str(job[key]) for key in ("status_reason", "message") if job.get(key))
    facts = {
        "reason": reason,
        "step": _step(job),
        "loss": number(progress.get("loss")),
        "validation loss": number(progress.get("val_loss")),
        "tokens/s": number(progress.get("tokens_per_s"), 0),
        "ETA": duration(progress.get("eta_s")),
        "attempt": str(job.get("attempt") or "-"),
        "failures": str(job.get("failures") or 0),
        "created": str(job.get("created_at")),
        "storage": str(job.get("storage_path")),
        "last checkpoint": str(nested(job, "last_checkpoint.path") or "-"),
    }
    for name, value in facts.items():
        if value:
            out.print(f"  {name:16} {escape(value)}")
    for error in nested(job, "problem.errors") or ():
        out.print(f"  [red]{escape(str(error.get('pointer')))}[/red] {escape(str(error.get('detail')))}")


def watch(job_id: JobId, url: Url = None, token: Token = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Follow a job to its end, live. Exit code 0 only when it succeeds."""
    with connect(url, token, data_dir) as client:
        watch_job(client, job_id, as_json=as_json)


def logs(
    job_id: JobId,
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
    attempt: Annotated[int | None, typer.Option(min=1, help="The newest when not given.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print a rank's log."""
    with connect(url, token, data_dir) as client:
        try:
            _print_log(client, job_id, rank=rank, attempt=attempt, follow=follow, as_json=as_json)
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def events(
    job_id: JobId,
    limit: Annotated[int, typer.Option(min=1, help="How many, oldest first.")] = 1000,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print a job's history."""
    with connect(url, token, data_dir) as client:
        page = _pages(lambda after, size: client.events(job_id, limit=size, after=after), limit)
    if as_json:
        print_json(page)
        return
    rows = [
        [str(event["seq"]), str(event["created_at"]), str(event.get("attempt") or "-"), str(event["type"]), str(event.get("message") or "")]
        for event in page["data"]
    ]
    print_table(["seq", "at", "attempt", "type", "message"], rows, empty="no events yet")


def metrics(
    job_id: JobId,
    keys: Annotated[str, typer.Option(help="Comma-separated names.")] = _METRICS,
    from_step: Annotated[int | None, typer.Option(min=0, help="First step.")] = None,
    max_points: Annotated[int | None, typer.Option(min=1, help="Thin out to this many rows.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Only this attempt; the newest per step when not given.")] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print a job's metrics by step."""
    with connect(url, token, data_dir) as client:
        page = client.metrics(job_id, keys=keys, from_step=from_step, max_points=max_points, attempt=attempt)
    if as_json:
        print_json(page)
        return
    names = [name.strip() for name in keys.split(",") if name.strip()]
    rows = [[str(row["step"]), str(row.get("attempt")), *(_cell(row.get(name)) for name in names)] for row in page["data"]]
    print_table(["step", "attempt", *names], rows, empty="no metrics yet")


def checkpoints(job_id: JobId, url: Url = None, token: Token = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List a job's committed checkpoints."""
    with connect(url, token, data_dir) as client:
        page = client.checkpoints(job_id)
    if as_json:
        print_json(page)
        return
    rows = [
        [str(entry["step"]), str(entry["attempt"]), number(entry.get("loss")), size(entry.get("bytes")), str(entry["path"])]
        for entry in page["data"]
    ]
    print_table(["step", "attempt", "loss", "size", "path"], rows, empty="no committed checkpoint yet")


def ranks(job_id: JobId, url: Url = None, token: Token = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show which rank runs where."""
    with connect(url, token, data_dir) as client:
        page = client.ranks(job_id)
    if as_json:
        print_json(page)
        return
    rows = [
        [
            str(entry["rank"]),
            str(entry.get("slot")),
            str(entry.get("address")),
            str(entry.get("gpu") if entry.get("gpu") is not None else "-"),
            str(entry.get("pid")),
            " ".join(f"{axis}{index}" for axis, index in (entry.get("coordinates") or {}).items()),
        ]
        for entry in page["data"]
    ]
    print_table(["rank", "slot", "address", "gpu", "pid", "coordinates"], rows, empty="no ranks yet")


def _pages(fetch: Callable[[str | None, int], dict[str, Any]], limit: int) -> dict[str, Any]:
    """Up to `limit` entries, over as many pages as that takes."""
    data: list[Any] = []
    after: str | None = None
    while True:
        page = fetch(after, min(_PAGE, limit - len(data)))
        data += page["data"]
        more = bool(page.get("has_more"))
        if not more or len(data) >= limit or not page["data"]:
            return {**page, "data": data, "first_id": _id(data[0]) if data else None, "last_id": _id(data[-1]) if data else None}
        after = page.get("last_id") or _id(page["data"][-1])


def _id(entry: Mapping[str, Any]) -> str:
    return str(entry["id"])


@dataclass
class _LogReader:
    """Reads one rank's log piece by piece, from one attempt into the next when none was asked for."""

    client: Client
    job_id: str
    rank: int
    attempt: int | None
    newest: bool = True
    offset: int = 0
    wrote: bool = False

    def read(self, as_json: bool) -> bool:
        """Prints all there is; whether the job had ended before (what is written later is then none)."""
        job = self.client.show(self.job_id)
        current = int(job.get("attempt") or 0)
        if self.attempt is None or (self.newest and current > self.attempt):
            if self.attempt:
                self._drain(as_json)
            self.attempt, self.offset = current or None, 0
        if self.attempt:
            self._drain(as_json)
        return job["status"] in TERMINAL

    def _drain(self, as_json: bool) -> None:
        while True:
            piece = self.client.logs(self.job_id, rank=self.rank, attempt=self.attempt, offset=self.offset)
            text, offset = str(piece.get("data") or ""), int(piece.get("next_offset") or self.offset)
            if offset <= self.offset:
                return
            self.offset, self.wrote = offset, True
            if as_json:
                print_json_line(piece)
            else:
                sys.stdout.write(text)
                sys.stdout.flush()


def _print_log(client: Client, job_id: str, *, rank: int, attempt: int | None, follow: bool, as_json: bool) -> None:
    reader = _LogReader(client, job_id, rank, attempt, newest=attempt is None)
    while not reader.read(as_json) and follow:
        time.sleep(_LOG_POLL_S)
    if not reader.wrote:
        raise Failure(f"rank {rank} of {job_id} has written no log yet", remedy=f"`megatron-ray show {job_id}` says where the job is")


def _step(job: Mapping[str, Any]) -> str:
    step, steps = nested(job, "progress.step"), nested(job, "progress.steps")
    return f"{step or 0}/{steps}" if steps else "-"


def _ago(job: Mapping[str, Any]) -> str:
    try:
        created = datetime.fromisoformat(str(job.get("created_at")))
    except ValueError:
        return "-"
    return duration((datetime.now(UTC) - created).total_seconds())


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else number(value)
