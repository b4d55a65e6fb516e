"""`megatron-ray demo`: the whole road once.

Starts a stack, submits a job through the public API, shows it, ends everything.
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

from service.cli.commands.generate import run_generation
from service.cli.commands.stack import INTERRUPTED, Cpus, with_stack
from service.cli.commands.watch import watch_job
from service.cli.connection import DataDir
from service.cli.failure import CommandError, from_service
from service.cli.output import number, size
from service.cli.spec_file import Overrides, read_spec
from service.client import Client, ServiceError
from service.local_stack.interruption import Interruption
from service.local_stack.record import StackRecord
from service.local_stack.stack import LocalStack, StackOptions

SPEC = Path("deploy/jobs/stdlib-tp2.yaml")
MIN_GAIN_NATS = 1.5
SAMPLE_CHARACTERS = 300

_PROMPT = "import os\n\ndef "
_TIMEOUT_S = 1200.0


def register(app: typer.Typer) -> None:
    """Adds this command."""
    app.command("demo")(demo)


def demo(
    spec: Annotated[Path, typer.Option(help="Job spec to run.")] = SPEC,
    overrides: Overrides = None,
    data_dir: DataDir = None,
    cpus: Cpus = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Stay up at the end, until Ctrl-C.")
    ] = False,
) -> None:
    """Train a small GPT through the service on this machine, look at it, and take
    everything down again.
    """
    interruption = Interruption()
    interruption.listen()
    values = read_spec(spec, overrides)
    folder = data_dir or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    options = StackOptions(folder.expanduser().absolute(), num_cpus=cpus)
    screen = Console(highlight=False)
    story = DemoStory(values, screen)
    try:
        with_stack(
            options,
            interruption,
            screen,
            lambda stack, record: _tell(story, stack, record, interruption, keep),
        )
    finally:
        screen.show_cursor()  # a progress bar cut short has hidden it
    if not story.succeeded:
        raise CommandError("interrupted; nothing is left running", exit_code=INTERRUPTED)
    words = (
        f"Everything is kept in {options.data_dir}; `megatron-ray up --data-dir {folder}` "
        "serves it again."
    )
    screen.print(escape(words), soft_wrap=True)


@dataclass
class DemoStory:
    """What the demo does with a stack that is up; runs in a thread, while the main
    thread supervises the stack.
    """

    spec: dict[str, Any]
    screen: Console
    succeeded: bool = False
    failure: CommandError | None = None
    _thread: threading.Thread | None = field(default=None, repr=False)

    def begin(self, record: StackRecord) -> None:
        """Starts the thread; it ends by itself when the stack does."""
        self._thread = threading.Thread(
            target=self._run, args=(record,), name="demo", daemon=True
        )
        self._thread.start()

    def is_over(self) -> bool:
        """Whether the thread has nothing more to do."""
        return self._thread is not None and not self._thread.is_alive()

    def _run(self, record: StackRecord) -> None:
        try:
            with Client(record.url, record.token) as client:
                self._tell(client, record)
            self.succeeded = True
        except CommandError as failure:
            self.failure = failure
        except ServiceError as error:
            self.failure = from_service(error)

    def _tell(self, client: Client, record: StackRecord) -> None:
        self.screen.print(
            f"service [bold]{escape(record.url)}[/bold], Ray dashboard "
            f"[bold]{escape(record.dashboard_url)}[/bold]"
        )
        job = client.submit(self.spec)
        self.screen.print(f"submitted [bold]{escape(job['id'])}[/bold] to POST /v1/jobs")
        job = watch_job(client, job["id"], out=self.screen)
        progress = job.get("progress") or {}
        checkpoint = job.get("last_checkpoint")
        if not checkpoint:
            raise CommandError(f"{job['id']} succeeded without a committed checkpoint")
        loss = progress.get("val_loss")
        baseline = progress.get("unigram_nats")
        if loss is None or baseline is None:
            raise CommandError(
                f"{job['id']} reported no validation loss or no unigram baseline",
                remedy="validation needs data.validation_fraction > 0",
            )
        text = sample(str(checkpoint["path"]))
        newest = client.checkpoints(job["id"])["data"]
        stored = next(
            (entry.get("bytes") for entry in newest if entry["path"] == checkpoint["path"]),
            None,
        )
        for line in closing_lines(job, record, stored, text):
            self.screen.print(line, soft_wrap=True)
        if baseline - loss < MIN_GAIN_NATS:
            raise CommandError(
                f"the model beats the unigram baseline by {baseline - loss:.2f} nat/token "
                f"only, expected at least {MIN_GAIN_NATS}"
            )


def sample(checkpoint: str) -> str:
    """The prompt and 300 generated characters; a model may end its document sooner, so
    up to five seeds are tried.
    """
    longest = ""
    for seed in range(1, 6):
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
    job: dict[str, Any], record: StackRecord, checkpoint_bytes: int | None, text: str
) -> list[str]:
    """What the demo ends with, as console markup."""
    progress = job["progress"]
    checkpoint = job["last_checkpoint"]
    loss = progress["val_loss"]
    baseline = progress["unigram_nats"]
    return [
        "",
        f"validation loss    [bold]{number(loss, 3)}[/bold] nat/token",
        f"unigram baseline   {number(baseline, 3)} nat/token, of the same validation tokens",
        f"gain               [bold]{number(baseline - loss, 3)}[/bold] nat/token",
        f"checkpoint         {escape(str(checkpoint['path']))} (step {checkpoint['step']}, "
        f"{size(checkpoint_bytes)})",
        f"seen at            {escape(record.url)}/v1/jobs/{escape(job['id'])} (token in "
        f"{escape(record.data_dir)}/tokens.json)",
        f"                   {escape(record.dashboard_url)} (Ray's dashboard)",
        f"{SAMPLE_CHARACTERS} characters generated from the checkpoint:",
        "",
        *(f"    {escape(line)}" for line in text.splitlines()),
        "",
    ]


def _tell(
    story: DemoStory,
    stack: LocalStack,
    record: StackRecord,
    interruption: Interruption,
    keep: bool,
) -> None:
    story.begin(record)
    deadline = time.monotonic() + _TIMEOUT_S
    stack.supervise(until=lambda: story.is_over() or time.monotonic() > deadline)
    if story.failure is not None:
        raise story.failure
    if not story.is_over() and not interruption.asked:
        raise CommandError(f"the demo was not over after {_TIMEOUT_S:.0f} s")
    if story.succeeded and keep:
        story.screen.print("Up until Ctrl-C.")
        stack.supervise()
