"""`megatron-ray demo`: trains a small GPT through the public API and cleans up.

Starts a stack, submits a job, follows it, samples from its checkpoint, ends the stack.
"""

import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from service.cli.commands.models.generate import run_generation
from service.cli.commands.stack import INTERRUPTED, Cpus, with_stack
from service.cli.commands.watch import watch_job
from service.cli.failure import CommandError, from_service
from service.cli.output import number, size
from service.cli.spec_file import Overrides, read_spec
from service.client import Client, ServiceError
from service.local_stack.interruption import Interruption
from service.local_stack.options import StackOptions
from service.local_stack.record import StackRecord
from service.local_stack.stack import LocalStack

DemoDataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Folder of the demo's stack and results. Default: runs/demo-DATE-TIME.",
        rich_help_panel="Service",
    ),
]
SPEC = Path("deploy/jobs/stdlib-tp2.yaml")
MIN_GAIN_NATS = 1.5
SAMPLE_CHARACTERS = 300

# Looks like the start of a module, since the corpus is Python's standard library.
_PROMPT = "import os\n\ndef "
_MAX_SEEDS = 5
_TIMEOUT_S = 1200.0


def register(app: typer.Typer) -> None:
    """Adds this command."""
    app.command("demo")(demo)


def demo(
    spec: Annotated[Path, typer.Option(help="Job spec to run.")] = SPEC,
    overrides: Overrides = None,
    data_dir: DemoDataDir = None,
    cpus: Cpus = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the stack up at the end, until Ctrl-C.")
    ] = False,
) -> None:
    """Train a small GPT on this machine through the service, then stop everything."""
    interruption = Interruption()
    interruption.listen()
    # Read before the stack starts, so that errors are reported at once.
    values = read_spec(spec, overrides)
    # A new folder for each run, so that the demo never resumes.
    folder = data_dir or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    options = StackOptions(folder.expanduser().absolute(), num_cpus=cpus)
    screen = Console(highlight=False)
    run = DemoRun(values, screen)

    def body(stack: LocalStack, record: StackRecord) -> None:
        _supervise(run, stack, record, interruption, keep)

    try:
        with_stack(options, interruption, screen, body)
    finally:
        screen.show_cursor()  # hidden by a progress bar that was interrupted
    if not run.succeeded:
        raise CommandError("interrupted; all processes were stopped", exit_code=INTERRUPTED)
    message = (
        f"Everything is kept in {options.data_dir}; serve it again with "
        f"`megatron-ray up --data-dir {folder}`."
    )
    screen.print(escape(message), soft_wrap=True)


@dataclass
class DemoRun:
    """The job of the demo, run in a thread while the main thread supervises the stack."""

    spec: dict[str, Any]
    screen: Console
    succeeded: bool = False
    failure: CommandError | None = None
    _thread: threading.Thread | None = field(default=None, repr=False)

    def begin(self, record: StackRecord) -> None:
        """Starts the thread."""
        # A daemon thread: when the stack ends first, its requests fail and it ends too.
        self._thread = threading.Thread(
            target=self._run, args=(record,), name="demo", daemon=True
        )
        self._thread.start()

    def is_over(self) -> bool:
        """Returns whether the thread has ended."""
        return self._thread is not None and not self._thread.is_alive()

    def _run(self, record: StackRecord) -> None:
        # Errors are raised again by the main thread.
        try:
            with Client(record.url, record.token) as client:
                self._train_and_sample(client, record)
            self.succeeded = True
        except CommandError as failure:
            self.failure = failure
        except ServiceError as error:
            self.failure = from_service(error)

    def _train_and_sample(self, client: Client, record: StackRecord) -> None:
        self.screen.print(
            f"service [bold]{escape(record.url)}[/bold], Ray dashboard "
            f"[bold]{escape(record.dashboard_url)}[/bold]"
        )
        job = client.submit(self.spec)
        self.screen.print(f"submitted [bold]{escape(job['id'])}[/bold] to POST /v1/jobs")
        job = watch_job(client, job["id"], out=self.screen)
        checkpoint = job.get("last_checkpoint")
        if not checkpoint:
            raise CommandError(f"{job['id']} succeeded without a committed checkpoint")
        gain = _gain_nats(job)
        generated = sample(str(checkpoint["path"]))
        checkpoint_bytes = _checkpoint_bytes(client, job)
        for line in closing_lines(job, record, checkpoint_bytes, generated):
            self.screen.print(line, soft_wrap=True)
        # Checked last, so that the numbers are on the screen when it fails.
        if gain < MIN_GAIN_NATS:
            raise CommandError(
                f"the model beats the unigram baseline by only {gain:.2f} nat/token, "
                f"expected at least {MIN_GAIN_NATS}"
            )


def _gain_nats(job: dict[str, Any]) -> float:
    """Returns by how many nats per token the model beats the unigram baseline."""
    progress = job.get("progress") or {}
    loss = progress.get("val_loss")
    baseline = progress.get("unigram_nats")
    if loss is None or baseline is None:
        raise CommandError(
            f"{job['id']} reported no validation loss or no unigram baseline",
            remedy="set data.validation_fraction above 0",
        )
    return float(baseline - loss)


def _checkpoint_bytes(client: Client, job: dict[str, Any]) -> int | None:
    """Returns the size of a job's last checkpoint, None when it is not listed."""
    for entry in client.checkpoints(job["id"])["data"]:
        if entry["path"] == job["last_checkpoint"]["path"]:
            num_bytes: int | None = entry.get("bytes")
            return num_bytes
    return None


def sample(checkpoint: str) -> str:
    """Returns the prompt and up to 300 generated characters."""
    longest = ""
    # A model may end its document early, so further seeds are tried.
    for seed in range(1, _MAX_SEEDS + 1):
        options = {
            "--max-new-tokens": SAMPLE_CHARACTERS,
            "--temperature": 0.8,
            "--top-k": 50,
            "--seed": seed,
        }
        generated = str(run_generation(checkpoint, _PROMPT, options)["text"])
        longest = max(longest, generated, key=len)
        if len(longest) >= SAMPLE_CHARACTERS:
            break
    return _PROMPT + longest[:SAMPLE_CHARACTERS]


def closing_lines(
    job: dict[str, Any], record: StackRecord, checkpoint_bytes: int | None, generated: str
) -> list[str]:
    """Returns the summary of the demo, as console markup."""
    progress = job["progress"]
    checkpoint = job["last_checkpoint"]
    loss = progress["val_loss"]
    baseline = progress["unigram_nats"]
    lines = [
        "",
        f"validation loss    [bold]{number(loss, 3)}[/bold] nat/token",
        f"unigram baseline   {number(baseline, 3)} nat/token on the same validation tokens",
        f"gain               [bold]{number(baseline - loss, 3)}[/bold] nat/token",
        f"checkpoint         {escape(str(checkpoint['path']))} (step {checkpoint['step']}, "
        f"{size(checkpoint_bytes)})",
        f"job                {escape(record.url)}/v1/jobs/{escape(job['id'])} (token: "
        f"{escape(record.data_dir)}/tokens.json)",
        f"Ray dashboard      {escape(record.dashboard_url)}",
        f"{SAMPLE_CHARACTERS} characters generated from the checkpoint:",
        "",
    ]
    for line in generated.splitlines():
        lines.append(f"    {escape(line)}")
    lines.append("")
    return lines


def _supervise(
    run: DemoRun,
    stack: LocalStack,
    record: StackRecord,
    interruption: Interruption,
    keep: bool,
) -> None:
    """Supervises the stack until the demo is over, and with `keep` until Ctrl-C."""
    run.begin(record)
    # The demo runs in a thread, because only the main thread restarts what exits.
    deadline = time.monotonic() + _TIMEOUT_S
    stack.supervise(until=lambda: run.is_over() or time.monotonic() > deadline)
    if run.failure is not None:
        raise run.failure
    if not run.is_over() and not interruption.is_requested:
        raise CommandError(f"the demo did not finish within {_TIMEOUT_S:.0f} s")
    if run.succeeded and keep:
        run.screen.print("The stack stays up until Ctrl-C.")
        stack.supervise()
