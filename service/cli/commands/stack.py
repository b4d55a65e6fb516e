"""Commands for the stack on this machine: up, down.

Must not know: how it is started or stopped (service/local_stack).
"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from service.cli.connection import DataDir, resolve_data_dir
from service.cli.detached import up_detached
from service.cli.failure import CommandError
from service.cli.numbers import at_least
from service.cli.output import AsJson, console, print_json
from service.local_stack.interruption import Interruption, StackError, StartInterruptedError
from service.local_stack.job_stops import StopJobs
from service.local_stack.options import StackOptions
from service.local_stack.record import RecordUnreadableError, StackRecord
from service.local_stack.stack import LocalStack
from service.local_stack.teardown import TeardownReport
from service.local_stack.teardown import down as end_stack

Cpus = Annotated[
    int | None,
    typer.Option(
        "--cpus",
        parser=at_least(1),
        help="CPUs that Ray may use. Default: all CPUs of the machine.",
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
        typer.Option(
            "--detach",
            help="Return when the stack is ready and keep it running; stop it with `down`.",
        ),
    ] = False,
    ready_timeout_s: Annotated[
        float,
        typer.Option(min=1, help="Maximum wait until the stack is ready, in seconds."),
    ] = 120.0,
    as_json: AsJson = False,
) -> None:
    """Start Ray, the service and its agent on this machine, and run until Ctrl-C."""
    # Installed first, so that from here on a signal stops the stack in order.
    interruption = Interruption()
    interruption.listen()
    folder = resolve_data_dir(data_dir)
    if detach:
        record = up_detached(folder, cpus, ready_timeout_s, interruption)
        _print_addresses(record, as_json)
        return
    options = StackOptions(folder, num_cpus=cpus, ready_timeout_s=ready_timeout_s)

    def run(stack: LocalStack, record: StackRecord) -> None:
        _print_addresses(record, as_json)
        if not as_json:
            console().print("stop everything with Ctrl-C or `megatron-ray down`")
        # Flushed, because the reader of a pipe waits for the addresses while this process
        # runs.
        sys.stdout.flush()
        stack.supervise()

    with_stack(options, interruption, _screen(as_json), run)


def _screen(as_json: bool) -> Console:
    # With --json, stdout holds JSON alone.
    return Console(stderr=as_json, highlight=False, soft_wrap=True)


def with_stack(
    options: StackOptions,
    interruption: Interruption,
    screen: Console,
    body: Callable[[LocalStack, StackRecord], None],
) -> TeardownReport:
    """Starts a stack, runs `body` with it, and ends it in any case.

    Raises CommandError when it does not start or is interrupted.
    """

    def print_message(message: str) -> None:
        screen.print(escape(message))

    stack = LocalStack(options, report=print_message, interruption=interruption)
    failure: CommandError | None = None
    try:
        with screen.status("starting") as status:
            stack.progress = lambda message: status.update(escape(message))
            record = stack.start()
        body(stack, record)
    except StartInterruptedError:
        failure = CommandError(
            "interrupted while starting; all processes were stopped", exit_code=INTERRUPTED
        )
    except StackError as error:
        message = str(error)
        if error.log_tail:
            message = f"{message}\n{error.log_tail}"
        failure = CommandError(message)
    except RecordUnreadableError as error:
        failure = CommandError(str(error))
    # Also after an unexpected error, so that no process outlives this one.
    finally:
        teardown = end_and_report(stack, screen)
    # Raised after the clean-up, as its message states that all processes were stopped.
    if failure is not None:
        raise failure
    return teardown


def end_and_report(stack: LocalStack, screen: Console) -> TeardownReport:
    """Ends a stack and prints what was killed and cancelled.

    Raises CommandError when processes survive SIGKILL.
    """
    try:
        teardown = stack.end()
    except TimeoutError as error:
        raise CommandError(str(error), remedy="run `megatron-ray down`") from error
    if teardown.was_up:
        screen.print(escape(describe(teardown)))
    return teardown


def describe(teardown: TeardownReport) -> str:
    """Returns one to three lines about a teardown."""
    lines = [f"stopped: {teardown.processes_killed} processes, temp dir removed"]
    if teardown.ended_by_up:
        # The number of processes is on the terminal of `up`.
        lines = ["stopped; no process is left"]
    jobs = teardown.jobs
    if jobs.ended:
        lines.append(f"ended: {', '.join(jobs.ended)}")
    if jobs.paused:
        lines.append(f"paused: {', '.join(jobs.paused)}; the next `up` resumes them")
    if jobs.interrupted:
        lines.append(
            f"interrupted: {', '.join(jobs.interrupted)}; the next `up` resumes them from "
            "their last checkpoint"
        )
    if jobs.waiting:
        lines.append(f"kept as they were: {', '.join(jobs.waiting)}")
    return "\n".join(lines)


def down(
    data_dir: DataDir = None,
    job_grace_s: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds that running jobs may take to write a checkpoint; 0 kills them, "
            "and they continue from their last one.",
        ),
    ] = 20.0,
    cancel_jobs: Annotated[
        bool,
        typer.Option(
            "--cancel-jobs",
            help="Cancel the jobs. Default: they are paused, and the next `up` resumes them.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Stop the local stack and everything it started; jobs are paused.

    The next `up` resumes them. Works even if `up` was killed, and may be repeated.
    """
    folder = resolve_data_dir(data_dir)
    # Messages come while jobs are ending, which can take the whole grace period.
    screen = _screen(as_json)
    stop = StopJobs.PAUSE
    if cancel_jobs:
        stop = StopJobs.CANCEL
    try:
        teardown = end_stack(
            folder, lambda message: screen.print(escape(message)), job_grace_s, stop
        )
    except RecordUnreadableError as error:
        raise CommandError(str(error)) from error
    except TimeoutError as error:
        raise CommandError(str(error), remedy="run `megatron-ray down` again") from error
    if as_json:
        print_json(
            {
                "was_up": teardown.was_up,
                "processes_killed": teardown.processes_killed,
                "jobs": asdict(teardown.jobs),
                "data_dir": str(folder),
            }
        )
    elif not teardown.was_up:
        console().print(f"nothing is up (data dir {escape(str(folder))})")
    else:
        console().print(escape(describe(teardown)))


def _print_addresses(record: StackRecord, as_json: bool) -> None:
    if as_json:
        print_json(addresses(record))
        return
    out = console()
    data_dir = escape(record.data_dir)
    # Paths instead of tokens, because a terminal may be shared or recorded.
    out.print("[bold green]megatron-ray is up[/bold green]")
    out.print(f"  service    {escape(record.url)}  (token: {data_dir}/tokens.json)")
    out.print(
        f"  dashboard  {escape(record.dashboard_url)}  (token: ray_token in "
        f"{data_dir}/stack.json)"
    )
    out.print(f"  logs       {data_dir}/logs")


def addresses(record: StackRecord) -> dict[str, Any]:
    """Returns addresses and paths of a stack, without its secrets."""
    return {
        "url": record.url,
        "dashboard_url": record.dashboard_url,
        "ray_address": record.ray_address,
        "data_dir": record.data_dir,
        "tokens_file": f"{record.data_dir}/tokens.json",
        "pid": record.up_pid,
    }
