"""`megatron-ray cancel`: ends one job or many.

Must not know: how a job is followed or displayed.
"""

import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import typer
from rich.markup import escape

from service.cli.choice import (
    JobChoice,
    JobIds,
    JobName,
    Labels,
    Statuses,
    labels,
    statuses,
)
from service.cli.commands.watch import TERMINAL
from service.cli.connection import DataDir, Token, Url, connect
from service.cli.failure import CommandError
from service.cli.output import AsJson, console, print_json, styled_status
from service.client import Client
from workers.protocol.states import ACTIVE_STATES
from workers.protocol.wording import counted

_POLL_S = 0.3
_JOBS_PER_REQUEST = 100
_USAGE = 2


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("cancel")(cancel)


def cancel(
    job_ids: JobIds = None,
    status: Statuses = None,
    name: JobName = None,
    metadata: Labels = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask before jobs are cancelled.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the jobs have ended.")
    ] = True,
    timeout_s: Annotated[float, typer.Option(help="Maximum wait, in seconds.")] = 180.0,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Cancel jobs after a final checkpoint: those named by id, or those that match.

    Without an id, --status, --name or --metadata choose among the jobs that have not
    ended, and the command asks before it cancels them.
    """
    is_filtered = bool(status or name or metadata)
    if bool(job_ids) == is_filtered:
        raise CommandError(
            "cancel needs job ids, or a choice by --status, --name or --metadata",
            remedy="`megatron-ray jobs` lists all jobs",
            exit_code=_USAGE,
        )
    with connect(url, token, data_dir) as client:
        ids = list(dict.fromkeys(job_ids or ()))
        if is_filtered:
            chosen = JobChoice(statuses(status), name, labels(metadata))
            ids = _confirmed(client, chosen, is_sure=yes)
        result = _cancel(client, ids)
        # The request returns before final checkpoints are written.
        if wait:
            result.wait_for_end(client, timeout_s)
    if as_json:
        print_json(result.as_json())
    else:
        result.show()
    result.check(is_waited_for=wait, timeout_s=timeout_s)


def _confirmed(client: Client, chosen: JobChoice, *, is_sure: bool) -> list[str]:
    """Returns the ids of the jobs that match, once the user has agreed to them."""
    ended = sorted(set(chosen.statuses) & TERMINAL)
    if ended:
        how = ended[0].replace("cancelled", "been cancelled")
        raise CommandError(
            f"jobs that have {how} cannot be cancelled",
            remedy=f"choose among {', '.join(ACTIVE_STATES)}",
            exit_code=_USAGE,
        )
    jobs = replace(chosen, statuses=chosen.statuses or ACTIVE_STATES).read(client)["data"]
    if not jobs or is_sure:
        return [job["id"] for job in jobs]
    counts = Counter(str(job["status"]) for job in jobs)
    parts = [f"{count} {state}" for state, count in counts.items()]
    summary = f"{counted(len(jobs), 'job')} ({', '.join(parts)})"
    if not sys.stdin.isatty():
        raise CommandError(
            f"{summary} would be cancelled; nothing was done",
            remedy="add --yes to cancel them",
            exit_code=_USAGE,
        )
    # On stderr: with --json, stdout is JSON alone.
    if not typer.confirm(f"cancel {summary}?", err=True):
        raise CommandError("nothing was cancelled")
    # The ids and not the filter: jobs that match only now were not agreed to.
    return [job["id"] for job in jobs]


@dataclass
class _Result:
    """What has become of the jobs, by id."""

    cancelled: dict[str, dict[str, Any]] = field(default_factory=dict)
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_found: list[str] = field(default_factory=list)

    def wait_for_end(self, client: Client, timeout_s: float) -> None:
        """Waits until all jobs have ended, at most `timeout_s` in all."""
        # Polled rather than streamed: this wait has a deadline.
        deadline = time.monotonic() + timeout_s
        for job_id, job in self.cancelled.items():
            while job["status"] not in TERMINAL and time.monotonic() < deadline:
                time.sleep(_POLL_S)
                job = client.show(job_id)
            self.cancelled[job_id] = job

    def as_json(self) -> dict[str, Any]:
        """Returns the service's answer, with the states after the wait."""
        cancelled = [_reference(job) for job in self.cancelled.values()]
        ended = [_reference(job) for job in self.ended.values()]
        return {
            "object": "job.cancellation",
            "cancelled": cancelled,
            "ended": ended,
            "not_found": self.not_found,
        }

    def show(self) -> None:
        """Prints one line for each job."""
        out = console()
        for job_id, job in self.cancelled.items():
            out.print(f"{escape(job_id)} {styled_status(str(job['status']))}")
        for job_id, job in self.ended.items():
            status = styled_status(str(job["status"]))
            out.print(f"{escape(job_id)} had ended before: {status}")
        if not self.cancelled and not self.ended and not self.not_found:
            out.print("no job that has not ended matches")

    def check(self, *, is_waited_for: bool, timeout_s: float) -> None:
        """Raises CommandError unless every job has been cancelled."""
        errors = []
        for job_id in self.not_found:
            errors.append(f"no job {job_id!r}")
        # A job may also end in another way before its cancellation takes effect.
        for job_id, job in {**self.ended, **self.cancelled}.items():
            status = str(job["status"])
            if status in ("succeeded", "failed"):
                errors.append(f"{job_id} {status} before it could be cancelled")
            elif is_waited_for and status not in TERMINAL:
                errors.append(f"{job_id} is still {status} after {timeout_s:.0f} s")
        if errors:
            remedy = ""
            if self.not_found:
                remedy = "`megatron-ray jobs` lists all jobs"
            raise CommandError("\n".join(errors), remedy=remedy, body=self.as_json())


def _cancel(client: Client, job_ids: list[str]) -> _Result:
    result = _Result()
    # In parts, so that no request holds up the service for long.
    for first in range(0, len(job_ids), _JOBS_PER_REQUEST):
        body = client.cancel_jobs(job_ids[first : first + _JOBS_PER_REQUEST])
        for job in body["cancelled"]:
            result.cancelled[job["id"]] = job
        for job in body["ended"]:
            result.ended[job["id"]] = job
        result.not_found += body["not_found"]
    return result


def _reference(job: dict[str, Any]) -> dict[str, Any]:
    return {key: job.get(key) for key in ("id", "name", "status")}
