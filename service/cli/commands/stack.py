"""Commands for the stack on this machine: up, down.

Must not know: how it is started or ended (service/local_stack does).
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from service.cli.connection import DataDir, local_stack, resolve_data_dir
from service.cli.failure import CommandError
from service.cli.output import AsJson, console, print_json
from service.local_stack.interruption import Interruption, StackError, StartInterruptedError
from service.local_stack.record import RecordUnreadableError, StackRecord
from service.local_stack.sessions import GatedProcess, is_running, send_signal
from service.local_stack.stack import LocalStack, StackOptions
from service.local_stack.teardown import TeardownReport
from service.local_stack.teardown import down as end_stack

Cpus = Annotated[
    int | None,
    typer.Option(
        "--cpus",
        min=1,
        help="CPUs that Ray may hand out; those of the machine when not given.",
    ),
]
INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    app.command("up")(up)
    app.command("down")(down)


def up(
    data_dir: DataDir = None,
    cpus: Cpus = None,
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Return once everything is ready; `down` ends it."),
    ] = False,
    ready_timeout_s: Annotated[
        float, typer.Option(min=1, help="Longest wait until everything is there.")
    ] = 120.0,
    as_json: AsJson = False,
) -> None:
    """Start Ray, the service and its agent on this machine, and look after them until
    Ctrl-C.
    """
    interruption = Interruption()
    interruption.listen()
    folder = resolve_data_dir(data_dir)
    if detach:
        _up_detached(folder, cpus, ready_timeout_s, interruption, as_json)
        return
    options = StackOptions(folder, num_cpus=cpus, ready_timeout_s=ready_timeout_s)
    screen = Console(stderr=as_json, highlight=False, soft_wrap=True)
    with_stack(
        options,
        interruption,
        screen,
        lambda stack, record: _announce(stack, record, as_json),
    )


def with_stack(
    options: StackOptions,
    interruption: Interruption,
    screen: Console,
    body: Callable[[LocalStack, StackRecord], None],
) -> TeardownReport:
    """Starts a stack, runs `body` with it, ends it whatever happens.

    Raises Failure when it does not start or is interrupted.
    """

    def say(text: str) -> None:
        screen.print(escape(text))

    stack = LocalStack(options, say=say, interruption=interruption)
    failure: CommandError | None = None
    try:
        with screen.status("starting") as status:
            stack.progress = lambda text: status.update(escape(text))
            record = stack.start()
        body(stack, record)
    except StartInterruptedError:
        failure = CommandError(
            "interrupted while starting; nothing is left running", exit_code=INTERRUPTED
        )
    except StackError as error:
        text = f"{error}\n{error.log_tail}" if error.log_tail else str(error)
        failure = CommandError(text)
    except RecordUnreadableError as error:
        failure = CommandError(str(error))
    finally:
        report = end_with_words(stack, screen)
    if failure is not None:
        raise failure
    return report


def end_with_words(stack: LocalStack, screen: Console) -> TeardownReport:
    """Ends a stack and says what that came to.

    Raises Failure for processes that survive SIGKILL.
    """
    try:
        report = stack.end()
    except TimeoutError as error:
        raise CommandError(str(error), remedy="`megatron-ray down` tries again") from error
    if report.was_up:
        screen.print(escape(describe(report)))
    return report


def describe(report: TeardownReport) -> str:
    """One or two lines about an end."""
    lines = [f"ended: {report.processes_killed} processes, temp dir removed"]
    if report.jobs_cancelled:
        lines.append(f"cancelled: {', '.join(report.jobs_cancelled)}")
    if report.jobs_interrupted:
        lines.append(
            f"interrupted: {', '.join(report.jobs_interrupted)}; the next `up` takes them "
            "on from their last checkpoint"
        )
    return "\n".join(lines)


def down(
    data_dir: DataDir = None,
    job_grace_s: Annotated[
        float,
        typer.Option(
            min=0, help="How long running jobs may take to write a last checkpoint."
        ),
    ] = 20.0,
    as_json: AsJson = False,
) -> None:
    """End the local stack and all it started.

    May be repeated; works too when `up` was killed.
    """
    folder = resolve_data_dir(data_dir)
    screen = Console(stderr=as_json, highlight=False, soft_wrap=True)
    try:
        report = end_stack(folder, lambda text: screen.print(escape(text)), job_grace_s)
    except RecordUnreadableError as error:
        raise CommandError(str(error)) from error
    except TimeoutError as error:
        raise CommandError(str(error), remedy="run `megatron-ray down` again") from error
    if as_json:
        print_json(
            {
                "was_up": report.was_up,
                "processes_killed": report.processes_killed,
                "data_dir": str(folder),
            }
        )
    elif not report.was_up:
        console().print(f"nothing is up (data dir {escape(str(folder))})")
    elif report.ended_by_up:
        console().print("ended; nothing is left running")
    else:
        console().print(escape(describe(report)))


def _announce(stack: LocalStack, record: StackRecord, as_json: bool) -> None:
    _print_addresses(record, as_json)
    if not as_json:
        console().print("Ctrl-C ends everything, and so does `megatron-ray down`.")
    sys.stdout.flush()
    stack.supervise()


def _print_addresses(record: StackRecord, as_json: bool) -> None:
    if as_json:
        print_json(addresses(record))
        return
    out = console()
    out.print("[bold green]megatron-ray is up[/bold green]")
    out.print(
        f"  service    {escape(record.url)}  (tokens: {escape(record.data_dir)}/tokens.json)"
    )
    out.print(
        f"  dashboard  {escape(record.dashboard_url)}  (it asks for a token: ray_token in "
        f"{escape(record.data_dir)}/stack.json)"
    )
    out.print(f"  logs       {escape(record.data_dir)}/logs")


def addresses(record: StackRecord) -> dict[str, Any]:
    """Where things are; no secret among them."""
    return {
        "url": record.url,
        "dashboard_url": record.dashboard_url,
        "ray_address": record.ray_address,
        "data_dir": record.data_dir,
        "tokens_file": f"{record.data_dir}/tokens.json",
        "pid": record.up_pid,
    }


def _up_detached(
    folder: Path,
    cpus: int | None,
    ready_timeout_s: float,
    interruption: Interruption,
    as_json: bool,
) -> None:
    """Runs `up` as a process of its own and waits until it is ready.

    It records itself before it starts anything.
    """
    command = [
        sys.executable,
        "-m",
        "service.cli.entry",
        "up",
        "--data-dir",
        str(folder),
        "--ready-timeout-s",
        str(ready_timeout_s),
    ]
    command += [] if cpus is None else ["--cpus", str(cpus)]
    log = folder / "logs" / "up.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        before = log.stat().st_size if log.exists() else 0
        child = GatedProcess(command, log=log)
    except OSError as error:
        raise CommandError(
            f"cannot write to the data dir {folder}: {error.strerror}",
            remedy="name another with --data-dir",
        ) from error
    child.release({})
    leader = child.session
    while True:
        if child.process.poll() is not None:
            with log.open("rb") as file:
                file.seek(before)
                said = file.read().decode(errors="replace").strip().removeprefix("error: ")
            raise CommandError(
                said or "`up` ended while starting", exit_code=child.process.returncode or 1
            )
        if interruption.asked:
            send_signal(leader.sid, leader.start_ticks, interruption.signal)
            while is_running(leader.sid, leader.start_ticks):
                time.sleep(0.1)
                child.process.poll()
            raise CommandError(
                "interrupted while starting; nothing is left running", exit_code=INTERRUPTED
            )
        record = local_stack(folder)
        if record is not None and record.up_pid == leader.sid and record.phase == "ready":
            _print_addresses(record, as_json)
            return
        time.sleep(0.1)
