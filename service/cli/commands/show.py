"""`megatron-ray show`: where a job is, what went wrong last, what is left to spend.

Must not know: how it is fetched by others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from service.cli.commands.jobs import JobId
from service.cli.connection import DataDir, Token, Url, connect
from service.cli.output import (
    AsJson,
    Column,
    console,
    duration,
    moment,
    nested,
    number,
    print_json,
    print_page,
    styled_level,
    styled_status,
)
from service.client import Client

_NEWEST_TROUBLES = 6
Json = Mapping[str, Any]
EVENT_COLUMNS: dict[str, Column] = {
    "seq": lambda event: str(event["seq"]),
    "at": lambda event: moment(event["created_at"]),
    "attempt": lambda event: str(event.get("attempt") or "-"),
    "level": lambda event: str(event.get("level") or ""),
    "type": lambda event: str(event["type"]),
    "message": lambda event: str(event.get("message") or ""),
}


def show(
    job_id: JobId,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show one job: where it is, what went wrong last, what is left of its restarts."""
    with connect(url, token, data_dir) as client:
        job = client.show(job_id)
        if as_json:
            print_json(job)
            return
        _print_job(client, job)


def _print_job(client: Client, job: Json) -> None:
    attempts = client.attempts(job["id"])["data"]
    started, recovered = (
        _newest(client, job["id"], kind) for kind in ("attempt.started", "job.recovered")
    )
    troubles = client.events(
        job["id"], levels="warn,error", newest_first=True, limit=_NEWEST_TROUBLES
    )["data"]
    out = console()
    out.print(
        f"[bold]{escape(job['id'])}[/bold] {escape(str(job.get('name')))}  "
        f"{styled_status(job['status'])}"
    )
    for name, value in {
        **_state(job),
        **_history(job, attempts, started, recovered),
        **_place(job),
    }.items():
        if value:
            out.print(f"  {name:16} {escape(value)}")
    for error in nested(job, "problem.errors") or ():
        out.print(
            f"  [red]{escape(str(error.get('pointer')))}[/red] {escape(str(error.get('detail')))}"
        )
    if troubles:
        out.print("[bold]newest warnings and errors[/bold]")
        print_page(
            {"data": troubles[::-1]}, False, EVENT_COLUMNS, empty="", style=event_style
        )


def _newest(client: Client, job_id: str, kind: str) -> Json | None:
    """The newest event of a type."""
    found: list[Json] = client.events(job_id, types=kind, newest_first=True, limit=1)[
        "data"
    ]
    return found[0] if found else None


def event_style(event: Json) -> str:
    """The colour of an event's row."""
    return styled_level(str(event.get("level")))


def step_of(job: Json) -> str:
    """Step and steps of a job."""
    step = nested(job, "progress.step")
    steps = nested(job, "progress.steps")
    return f"{step or 0}/{steps}" if steps else "-"


def _state(job: Json) -> dict[str, str]:
    progress = job.get("progress") or {}
    return {
        "reason": ": ".join(
            str(job[key]) for key in ("status_reason", "message") if job.get(key)
        ),
        "step": step_of(job),
        "loss": number(progress.get("loss")),
        "validation loss": number(progress.get("val_loss")),
        "tokens/s": number(progress.get("tokens_per_s"), 0),
        "ETA": duration(progress.get("eta_s")) if job["status"] == "running" else "",
    }


def _history(
    job: Json, attempts: Sequence[Json], started: Json | None, recovered: Json | None
) -> dict[str, str]:
    current = attempts[-1] if attempts else None
    failed = [attempt for attempt in attempts if attempt["state"] == "failed"]
    return {
        "attempt": _attempt(current, started)
        if current is not None
        else str(job.get("attempt") or "-"),
        "restarts": _restarts(job),
        "last failure": _failure(failed[-1]) if failed else "",
        "last recovery": f"{moment(recovered['created_at'])}  {recovered['message']}"
        if recovered
        else "",
    }


def _attempt(attempt: Json, started: Json | None) -> str:
    """`started` is the newest event of a start, whose message is where from."""
    origin = (
        f" {started['message']}"
        if started is not None and started["attempt"] == attempt["attempt"]
        else ""
    )
    since = f", since {moment(attempt['started_at'])}" if attempt.get("started_at") else ""
    ended = f", ended {moment(attempt['ended_at'])}" if attempt.get("ended_at") else ""
    return f"{attempt['attempt']} {attempt['state']}{origin}{since}{ended}"


def _failure(attempt: Json) -> str:
    """The root cause, in the words of the driver that has seen it."""
    at = f"{moment(attempt['ended_at'])}  " if attempt.get("ended_at") else ""
    reason = f" ({attempt['reason']})" if attempt.get("reason") else ""
    return (
        f"{at}attempt {attempt['attempt']}: "
        f"{attempt.get('message') or 'no cause was recorded'}{reason}"
    )


def _restarts(job: Json) -> str:
    """How much of the budget is spent; the attempt that fails with nothing left ends
    the job.
    """
    failures = int(job.get("failures") or 0)
    most = nested(job, "resolved_spec.restart.max_failures")
    text = (
        f"{failures} failures" if most is None else f"{failures} of {most} failures spent"
    )
    return text + (f", {job['preemptions']} preemptions" if job.get("preemptions") else "")


def _place(job: Json) -> dict[str, str]:
    last = job.get("last_checkpoint")
    return {
        "last checkpoint": f"step {last['step']}  {last['path']}" if last else "-",
        "created": moment(job.get("created_at")),
        "ended": moment(job["ended_at"]) if job.get("ended_at") else "",
        "storage": str(job.get("storage_path")),
    }
