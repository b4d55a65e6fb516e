"""`megatron-ray show`: a job's state, progress, restarts and last problems."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from service.cli.choice import JobId
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
    print_note,
    print_page,
    styled_level,
    styled_status,
)
from service.client import Client
from workers.protocol.states import JobState
from workers.protocol.wording import counted

_NUM_PROBLEM_EVENTS = 6
_NUM_SLOW_RANKS = 4
_NUM_TIMED_STEPS = 10
"""Newest steps whose times are averaged."""
_SMALL_SHARE = 0.01
"""Parts of a step below this share are not printed."""
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
    """Show a job's state, progress, restarts and last problems."""
    with connect(url, token, data_dir) as client:
        job = client.show(job_id)
        if as_json:
            print_json(job)
            return
        _print_job(client, job)


def _print_job(client: Client, job: Json) -> None:
    # All requests are made before printing, so that a failed one leaves no partial output.
    job_id = job["id"]
    attempts = client.attempts(job_id)["data"]
    started = _newest_event(client, job_id, "attempt.started")
    recovered = _newest_event(client, job_id, "job.recovered")
    step_time = _step_time(_newest_steps(client, job))
    slow = [row for row in client.ranks(job_id)["data"] if row.get("slow")]
    problems = client.events(
        job_id, levels="warn,error", newest_first=True, limit=_NUM_PROBLEM_EVENTS
    )
    _print_heading(job)
    fields = {
        **_state(job),
        "step time": step_time,
        **_history(job, attempts, started, recovered),
        "slow ranks": _slow_ranks(job, slow),
        "watched": _watched(job),
        **_storage(job),
    }
    for label, value in fields.items():
        if value:
            console().print(f"  {label:16} {escape(value)}")
    for error in nested(job, "problem.errors") or ():
        pointer = escape(str(error.get("pointer")))
        console().print(f"  [red]{pointer}[/red] {escape(str(error.get('detail')))}")
    if problems["data"]:
        _print_problems(job_id, problems)


def _print_problems(job_id: str, problems: Json) -> None:
    """Prints a page of a job's warnings and errors, fetched newest first, oldest first."""
    events = problems["data"]
    console().print("[bold]newest warnings and errors[/bold]")
    page = {"data": events[::-1]}
    print_page(page, False, EVENT_COLUMNS, empty="", style=event_style)
    if problems["has_more"]:
        print_note(
            f"{len(events)} of {problems['total']}; show all with `megatron-ray events "
            f"{job_id} --level warn,error`"
        )


def _print_heading(job: Json) -> None:
    name = escape(str(job.get("name")))
    status = styled_status(job["status"])
    console().print(f"[bold]{escape(job['id'])}[/bold] {name}  {status}")


def _newest_steps(client: Client, job: Json) -> Sequence[Json]:
    """Returns the times of the newest steps; none before the first."""
    step = nested(job, "progress.step")
    if not step:
        return ()
    first = max(1, step - _NUM_TIMED_STEPS + 1)
    page = client.metrics(job["id"], keys="step_s,split_s", from_step=first)
    rows: Sequence[Json] = page["data"]
    return rows


def _newest_event(client: Client, job_id: str, event_type: str) -> Json | None:
    page = client.events(job_id, types=event_type, newest_first=True, limit=1)
    for event in page["data"]:
        newest: Json = event
        return newest
    return None


def event_style(event: Json) -> str:
    """Returns the colour of an event's row."""
    return styled_level(str(event.get("level")))


def absence(job: Mapping[str, Any], what: str) -> str:
    """Returns a line for an empty list, and whether there may be entries later."""
    if JobState(job["status"]).is_terminal:
        return f"{what}; the job has ended ({job['status']})"
    return f"{what} yet; the job is {job['status']}"


def step_of(job: Json) -> str:
    """Returns a job's step and its number of steps, such as `5/10`."""
    num_steps = nested(job, "progress.steps")
    # A job without progress has no number of steps yet.
    if not num_steps:
        return "-"
    return f"{nested(job, 'progress.step') or 0}/{num_steps}"


def _state(job: Json) -> dict[str, str]:
    progress = job.get("progress") or {}
    # Both are often missing; empty values are not printed.
    reasons: list[str] = []
    for key in ("status_reason", "message"):
        if job.get(key):
            reasons.append(str(job[key]))
    eta = ""
    if job["status"] == "running":
        eta = duration(progress.get("eta_s"))
    return {
        "reason": ": ".join(reasons),
        "step": step_of(job),
        "loss": number(progress.get("loss")),
        "validation loss": _validation_loss(progress),
        "tokens/s": number(progress.get("tokens_per_s"), 0),
        "ETA": eta,
    }


def _step_time(rows: Sequence[Json]) -> str:
    """Returns the mean time of steps and the shares of its parts, largest first."""
    total_s = 0.0
    by_part: dict[str, float] = {}
    for row in rows:
        total_s += row.get("step_s") or 0.0
        for name, seconds in (row.get("split_s") or {}).items():
            by_part[name] = by_part.get(name, 0.0) + (seconds or 0.0)
    if not total_s:
        return ""
    parts = []
    for name, seconds in sorted(by_part.items(), key=lambda part: -part[1]):
        if seconds >= _SMALL_SHARE * total_s:
            parts.append(f"{name} {seconds / total_s:.0%}")
    text = f"{number(total_s / len(rows))} s"
    if parts:
        text += f"  ({', '.join(parts)})"
    return text


def _validation_loss(progress: Json) -> str:
    text = number(progress.get("val_loss"))
    by_source = progress.get("source_val_losses") or {}
    # A single source has the loss of the blend.
    if len(by_source) > 1:
        parts: list[str] = []
        for name, loss in by_source.items():
            parts.append(f"{name} {number(loss)}")
        text += f"  ({', '.join(parts)})"
    return text


def _history(
    job: Json, attempts: Sequence[Json], started: Json | None, recovered: Json | None
) -> dict[str, str]:
    # Without attempts the job's own counter is shown.
    current = str(job.get("attempt") or "-")
    if attempts:
        current = _attempt(attempts[-1], started)
    # Attempts come oldest first: the last match is the newest.
    last_failure = ""
    for attempt in attempts:
        if attempt["state"] == "failed":
            last_failure = _failure(attempt)
    last_recovery = ""
    if recovered:
        last_recovery = f"{moment(recovered['created_at'])}  {recovered['message']}"
    return {
        "attempt": current,
        "restarts used": _restarts(job, attempts),
        "last failure": last_failure,
        "last recovery": last_recovery,
    }


def _slow_ranks(job: Json, slow: Sequence[Json]) -> str:
    """Returns the ranks that the others wait for; nothing for a job that has ended."""
    if JobState(job["status"]).is_terminal:
        return ""
    parts = []
    for row in slow[:_NUM_SLOW_RANKS]:
        ratio = number(row["slow"]["ratio"], 1)
        parts.append(
            f"rank {row['rank']} on {row.get('address')} ({ratio} times its peers)"
        )
    if len(slow) > _NUM_SLOW_RANKS:
        parts.append(f"{len(slow) - _NUM_SLOW_RANKS} more")
    return ", ".join(parts)


def _attempt(attempt: Json, started: Json | None) -> str:
    text = f"{attempt['attempt']} {attempt['state']}"
    # The message of `attempt.started` is the step or checkpoint that the attempt starts
    # from.
    if started is not None and started["attempt"] == attempt["attempt"]:
        text += f" ({started['message']})"
    if attempt.get("started_at"):
        text += f", since {moment(attempt['started_at'])}"
    if attempt.get("ended_at"):
        text += f", ended {moment(attempt['ended_at'])}"
    return text


def _failure(attempt: Json) -> str:
    """Returns the root cause of a failed attempt, as the driver reported it."""
    message = attempt.get("message") or "no cause was recorded"
    text = f"attempt {attempt['attempt']}: {message}"
    if attempt.get("ended_at"):
        text = f"{moment(attempt['ended_at'])}  {text}"
    if attempt.get("reason"):
        text += f" ({attempt['reason']})"
    return text


def _restarts(job: Json, attempts: Sequence[Json]) -> str:
    """Returns how many restarts are used: failed attempts that another one followed."""
    used = 0
    for attempt in attempts[:-1]:
        if attempt["state"] == "failed" and attempt.get("reason") != "preempted":
            used += 1
    # A resume gives a new budget; the failure that ended the job led to no restart.
    counted = int(job.get("failures") or 0)
    if job["status"] == "failed" and attempts and attempts[-1]["state"] == "failed":
        counted -= 1
    text = str(max(0, min(used, counted)))
    max_failures = nested(job, "resolved_spec.restart.max_failures")
    if max_failures is not None:
        text += f" of {max_failures}"
    # Preemptions have a separate budget.
    if job.get("preemptions"):
        text += f", plus {job['preemptions']} preemptions"
    return text


def _watched(job: Json) -> str:
    """Returns the job's callbacks, and the command that lists their numbers."""
    callbacks = nested(job, "resolved_spec.callbacks") or {}
    parts = []
    for name, callback in {**callbacks, **callbacks.get("installed", {})}.items():
        if callback and "every_steps" in callback:
            parts.append(f"{name} every {counted(callback['every_steps'], 'step')}")
    if not parts:
        return ""
    command = f"megatron-ray metrics {job['id']} --keys monitors"
    return f"{', '.join(parts)}; `{command}`"


def _storage(job: Json) -> dict[str, str]:
    last_checkpoint = "-"
    checkpoint = job.get("last_checkpoint")
    if checkpoint:
        last_checkpoint = f"step {checkpoint['step']}  {checkpoint['path']}"
    ended = ""
    if job.get("ended_at"):
        ended = moment(job["ended_at"])
    return {
        "last checkpoint": last_checkpoint,
        "created": moment(job.get("created_at")),
        "ended": ended,
        "storage": str(job.get("storage_path")),
    }
