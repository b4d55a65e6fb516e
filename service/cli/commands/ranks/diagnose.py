"""`megatron-ray diagnose`: what all ranks of a job do, and which one the others wait for.

Must not know: how ranks are examined.
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
    print_json,
    print_note,
    print_page,
    size,
)
from service.client import Client, ServiceError

_POLL_S = 0.2
Json = Mapping[str, Any]


def register(app: typer.Typer) -> None:
    """Adds this command."""
    app.command("diagnose")(diagnose)


def diagnose(
    job_id: JobId,
    newest: Annotated[
        bool,
        typer.Option(
            "--newest", help="Print the newest diagnosis, such as that of a hang; ask none."
        ),
    ] = False,
    timeout_s: Annotated[
        int, typer.Option("--timeout", parser=at_least(1), help="Seconds to wait for it.")
    ] = 30,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Examine all ranks of a job: what each waits in, and which one the others wait for.

    Training goes on. After a hang the job has a diagnosis already: see --newest.
    """
    with connect(url, token, data_dir) as client:
        diagnosis: Json
        if newest:
            diagnosis = client.diagnosis(job_id)
        else:
            diagnosis = _requested(client, job_id, timeout_s)
    if as_json:
        print_json(diagnosis)
    else:
        _print(diagnosis)


def _requested(client: Client, job_id: str, timeout_s: float) -> Json:
    """Requests a diagnosis and waits for it. Raises CommandError when it does not come."""
    before = _newest_id(client, job_id)
    client.request_diagnosis(job_id)
    deadline = time.monotonic() + timeout_s
    while _newest_id(client, job_id) == before:
        if time.monotonic() > deadline:
            status = client.show(job_id)["status"]
            raise CommandError(
                f"no diagnosis of {job_id} within {timeout_s} s; the job is {status}",
                remedy="its driver answers while ranks run; look again with --newest",
            )
        time.sleep(_POLL_S)
    return client.diagnosis(job_id)


def _newest_id(client: Client, job_id: str) -> str | None:
    try:
        return str(client.diagnosis(job_id)["id"])
    except ServiceError as error:
        # The job exists, but has no diagnosis yet.
        if [problem.code for problem in error.errors] == ["no_diagnosis"]:
            return None
        raise


def _print(diagnosis: Json) -> None:
    out = console()
    at = moment(diagnosis["created_at"])
    trigger = "on request"
    if diagnosis["trigger"] == "hang":
        trigger = "because no rank made progress"
    out.print(f"[bold]{escape(str(diagnosis['job_id']))}[/bold] attempt ", end="")
    out.print(f"{diagnosis['attempt']}, examined {trigger} at {at}")
    out.print(f"  {escape(str(diagnosis['reason']))}")
    text = escape("; ".join(map(_place, diagnosis["culprits"])))
    if text:
        out.print(f"  [red]look at[/red] {text} (confidence: {diagnosis['confidence']})")
    columns: dict[str, Column] = {
        "rank": lambda row: str(row["rank"]),
        "address": lambda row: str(row.get("address")),
        "pid": lambda row: str(row.get("pid")),
        "step": lambda row: _or_dash(row.get("step")),
        "phase": _phase,
        "waits in": _wait,
        "for": _waited,
        "memory": lambda row: size(row.get("memory_bytes")),
        "GPU memory": lambda row: size(row.get("device_memory_bytes")),
        "free": lambda row: size(row.get("free_memory_bytes")),
        "load": lambda row: _or_dash(row.get("load")),
    }
    print_page({"data": diagnosis["ranks"]}, False, columns, empty="no ranks")
    num_more = diagnosis["num_ranks"] - len(diagnosis["ranks"])
    if num_more > 0:
        print_note(f"and {num_more} more ranks")
    for stack in diagnosis["stacks"]:
        ranks = ", ".join(map(str, stack["ranks"]))
        out.print(f"[bold]stack of rank {ranks}[/bold], innermost first")
        for line in stack["lines"]:
            out.print(f"  {escape(line)}")


def _place(culprit: Json) -> str:
    text = f"rank {culprit['rank']} on {culprit.get('address')}, pid {culprit.get('pid')}"
    if culprit.get("gpu") is not None:
        text += f", GPU {culprit['gpu']}"
    return text


def _phase(row: Json) -> str:
    if not row["answered"]:
        return "does not answer"
    if row.get("microbatch") is None or row["phase"] != "forward_backward":
        return str(row["phase"])
    return f"{row['phase']} (microbatch {row['microbatch']})"


def _wait(row: Json) -> str:
    wait = row.get("waits_in")
    if wait is None:
        return "-"
    if wait["operation"] == "device":
        return "its device"
    text = f"{wait['operation']} {wait['number']} of {wait['axis']}"
    if wait.get("peer") is not None:
        text += f" (rank {wait['peer']})"
    return text


def _waited(row: Json) -> str:
    wait = row.get("waits_in")
    if wait is None:
        return "-"
    return f"{wait['seconds']:.1f} s"


def _or_dash(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}"
