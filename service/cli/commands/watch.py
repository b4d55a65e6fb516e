"""Follows a job: a progress bar on a terminal, plain lines elsewhere.

`Watcher` converts stream events to lines and numbers, independent of a terminal;
`watch_job` prints them. Must not know: commands.
"""

import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from megatron_ray.config.schedules.batch_sizes import BatchSizes, batch_sizes_of
from service.cli.failure import CommandError, with_field_lines
from service.cli.output import (
    duration,
    nested,
    number,
    print_json_line,
    short_number,
    styled_level,
    styled_status,
)
from service.client import Client, ServiceError
from service.event_stream import StreamEvent
from workers.protocol.states import JobState

TERMINAL = frozenset(state.value for state in JobState if state.is_terminal)
"""Statuses of a job that has ended."""

_SECONDS_BETWEEN_LINES = 5.0
_BAR_WIDTH = 16
# Each has a connection and a thread.
_MAX_JOBS = 50
_WIDE = 100
"""Columns from which on numbers are written in full beside the bar."""
# Weight of the newest step in the throughput behind the ETA.
_SMOOTHING = 0.1
_STATE_EVENTS = frozenset(f"job.{state.value}" for state in JobState)


@dataclass
class Watcher:
    """The state of a job after the stream's events so far."""

    verbose: bool = False
    """Whether to print events of single ranks and removed checkpoints too."""
    steps: int | None = None
    """Number of steps of the whole job."""
    status: str = ""
    step: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    _batch_sizes: BatchSizes | None = field(default=None, repr=False)
    _seq_length: int | None = field(default=None, repr=False)
    _smooth_tokens_per_s: float | None = field(default=None, repr=False)
    _last_message: str = field(default="", repr=False)

    def update_job(self, job: Mapping[str, Any]) -> None:
        """Reads the size of the job from a Job object."""
        # Only the resolved spec holds defaults, such as the batch size.
        spec = job.get("resolved_spec") or job.get("spec") or {}
        steps = nested(job, "progress.steps") or nested(spec, "training.steps")
        if isinstance(steps, int):
            self.steps = steps
        self._batch_sizes = batch_sizes_of(spec.get("training") or {})
        seq_length = nested(spec, "training.seq_length")
        if isinstance(seq_length, int):
            self._seq_length = seq_length

    def handle_event(self, event: StreamEvent) -> list[str]:
        """Updates the state and returns the lines to print, as console markup."""
        # Events of newer services may have other shapes; they are ignored.
        data: Mapping[str, Any] = {}
        if isinstance(event.data, Mapping):
            data = event.data
        if event.event == "metrics":
            for row in data.get("rows") or ():
                self._update_metrics(row)
            return []
        if event.event == "state":
            return self._update_status(data)
        message = str(data.get("message") or "")
        if event.event == "end" or not message:
            return []
        style = styled_level(str(data.get("level")))
        # Warnings and errors are always printed.
        if not style and not self.verbose and _is_detail(event.event):
            return []
        self._last_message = message
        style = style or "dim"
        return [f"[{style}]{escape(message)}[/{style}]"]

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at the smoothed throughput; None before the first."""
        if not self._smooth_tokens_per_s or self.steps is None:
            return None
        if self._batch_sizes is None or self._seq_length is None:
            return None
        taken = self._batch_sizes.samples_after(self.step)
        remaining = max(0, self._batch_sizes.samples_after(self.steps) - taken)
        return remaining * self._seq_length / self._smooth_tokens_per_s

    def progress_line(self, *, is_short: bool = False) -> str:
        """Returns step, loss, throughput and ETA on one line; `is_short`: beside a bar."""
        speed = number(self.tokens_per_s, 0)
        if is_short:
            speed = short_number(self.tokens_per_s)
        return (
            f"step {self.step}/{self.steps or '?'}  loss {number(self.loss)}  "
            f"{speed} tokens/s  ETA {duration(self.eta_s)}"
        )

    def _update_metrics(self, row: Mapping[str, Any]) -> None:
        # Rows of an evaluation have no loss; the training loss stays on display.
        if isinstance(row.get("step"), int) and row.get("loss") is not None:
            self.step = row["step"]
            self.loss = row["loss"]
        speed = row.get("tokens_per_s")
        if not isinstance(speed, int | float) or speed <= 0:
            return
        self.tokens_per_s = float(speed)
        # Exponential moving average, which starts at the first value.
        if self._smooth_tokens_per_s is None:
            self._smooth_tokens_per_s = float(speed)
        else:
            self._smooth_tokens_per_s *= 1 - _SMOOTHING
            self._smooth_tokens_per_s += _SMOOTHING * float(speed)

    def _update_status(self, job: Mapping[str, Any]) -> list[str]:
        self.update_job(job)
        status = str(job.get("status") or "")
        if not status or status == self.status:
            return []
        self.status = status
        line = styled_status(status)
        message = str(job.get("message") or job.get("status_reason") or "")
        # The event that caused the change often has the same message.
        if message and message != self._last_message:
            line += f"  {escape(message)}"
        return [line]


def _is_detail(event_type: str) -> bool:
    """Returns whether only `megatron-ray events` and --verbose show this event."""
    if event_type.startswith("rank.") or event_type == "checkpoint.deleted":
        return True
    # Status changes have lines of their own.
    return event_type in _STATE_EVENTS


def watch_job(
    client: Client,
    job_id: str,
    *,
    as_json: bool = False,
    verbose: bool = False,
    out: Console | None = None,
) -> dict[str, Any]:
    """Follows a job to its end and returns it.

    Raises CommandError unless it succeeded.
    """
    watcher = Watcher(verbose=verbose)
    watcher.update_job(client.show(job_id))
    screen = out or Console(highlight=False)
    try:
        if as_json:
            _follow_json(client, job_id)
        elif screen.is_terminal:
            _follow_live(client, job_id, watcher, screen)
        else:
            _follow_plain(client, job_id, watcher, screen)
    except KeyboardInterrupt:
        raise CommandError(
            f"stopped watching; {job_id} is still running",
            remedy=f"reattach with `megatron-ray watch {job_id}`, cancel it with "
            f"`megatron-ray cancel {job_id}`",
            exit_code=130,
        ) from None
    # Fetched again, because --json does not track the state.
    job = client.show(job_id)
    if job["status"] != "succeeded":
        raise failure_of(job)
    return job


def failure_of(job: Mapping[str, Any]) -> CommandError:
    """Returns the error of a job that failed or was cancelled."""
    problem = job.get("problem") or {}
    cause = (
        job.get("message")
        or problem.get("detail")
        or job.get("status_reason")
        or "no reason was recorded"
    )
    fields: list[tuple[str, str]] = []
    for error in problem.get("errors") or ():
        fields.append((error.get("pointer"), error.get("detail")))
    remedy = ""
    # A cancelled job needs no investigation.
    if job["status"] == "failed":
        remedy = (
            f"see `megatron-ray logs {job['id']}` and `megatron-ray events {job['id']}`"
        )
    title = f"{job['id']} {job['status']}: {cause}"
    return CommandError(with_field_lines(title, fields), remedy=remedy, body=dict(job))


def _follow_json(client: Client, job_id: str) -> None:
    for event in client.stream(job_id):
        print_json_line({"event": event.event, "id": event.id, "data": event.data})


def _follow_live(client: Client, job_id: str, watcher: Watcher, screen: Console) -> None:
    # The numbers fit beside the bar at 80 columns, also those of long jobs.
    columns = (
        BarColumn(bar_width=_BAR_WIDTH),
        TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
    )
    screen.print(f"watching [bold]{escape(job_id)}[/bold]")
    with Progress(*columns, console=screen) as progress:
        task = progress.add_task("", total=watcher.steps, numbers="waiting")
        for event in client.stream(job_id):
            # Printed through the progress bar, which keeps them above itself.
            for line in watcher.handle_event(event):
                progress.console.print(line)
            numbers = watcher.status
            if watcher.step:
                numbers = watcher.progress_line(is_short=screen.width < _WIDE)
            progress.update(
                task, total=watcher.steps, completed=watcher.step, numbers=numbers
            )


def _follow_plain(client: Client, job_id: str, watcher: Watcher, screen: Console) -> None:
    printer = _PlainPrinter(watcher, screen)
    for event in client.stream(job_id):
        printer.print(event)


@dataclass
class _PlainPrinter:
    """Prints a job as plain lines, its numbers at most every few seconds."""

    watcher: Watcher
    screen: Console
    prefix: str = ""
    """Console markup in front of each line."""
    _last_line_at: float = field(default=-_SECONDS_BETWEEN_LINES, repr=False)
    _last_step: int = field(default=0, repr=False)

    def print(self, event: StreamEvent) -> None:
        """Prints what an event changes."""
        watcher = self.watcher
        lines = watcher.handle_event(event)
        # The last step is printed even directly after another one.
        is_last = watcher.step == watcher.steps or event.event == "end"
        is_due = time.monotonic() - self._last_line_at >= _SECONDS_BETWEEN_LINES
        # Before an event, so that a history reads in its order.
        is_due = is_due or bool(lines)
        if watcher.step > self._last_step and (is_last or is_due):
            lines = [watcher.progress_line(), *lines]
            self._last_line_at = time.monotonic()
            self._last_step = watcher.step
        for line in lines:
            self.screen.print(self.prefix + line, soft_wrap=True)
        sys.stdout.flush()


# ---- several jobs


def watch_jobs(
    client: Client,
    job_ids: Sequence[str],
    *,
    as_json: bool = False,
    verbose: bool = False,
    out: Console | None = None,
) -> None:
    """Follows jobs until all of them have ended, several as plain lines with their ids.

    Raises CommandError unless all succeeded.
    """
    ids = list(dict.fromkeys(job_ids))
    if len(ids) == 1:
        watch_job(client, ids[0], as_json=as_json, verbose=verbose, out=out)
        return
    if len(ids) > _MAX_JOBS:
        raise CommandError(
            f"{len(ids)} jobs; at most {_MAX_JOBS} can be watched at once",
            remedy="`megatron-ray jobs` shows the state of any number",
            exit_code=2,
        )
    printers = {}
    screen = out or Console(highlight=False)
    # All are read before the first line, so that an unknown id is an error at once.
    for job_id in ids:
        watcher = Watcher(verbose=verbose)
        watcher.update_job(client.show(job_id))
        printers[job_id] = _PlainPrinter(watcher, screen, f"[bold]{escape(job_id)}[/bold] ")
    unfinished = dict.fromkeys(ids)
    try:
        for job_id, event in _merged_streams(client, ids):
            if event.event == "end":
                del unfinished[job_id]
            if as_json:
                line = {"job_id": job_id, "event": event.event, "id": event.id}
                print_json_line({**line, "data": event.data})
            else:
                printers[job_id].print(event)
    except KeyboardInterrupt:
        left = " ".join(unfinished)
        raise CommandError(
            f"stopped watching; still running: {left}",
            remedy=f"reattach with `megatron-ray watch {left}`",
            exit_code=130,
        ) from None
    _require_success([client.show(job_id) for job_id in ids])


def _merged_streams(
    client: Client, job_ids: Sequence[str]
) -> Iterator[tuple[str, StreamEvent]]:
    """Yields the events of several jobs as they arrive, until all have ended."""
    arrived: queue.SimpleQueue[tuple[str, StreamEvent | Exception | None]]
    arrived = queue.SimpleQueue()

    def read(job_id: str) -> None:
        last: Exception | None = None
        try:
            for event in client.stream(job_id):
                arrived.put((job_id, event))
        except ServiceError as error:
            last = error
        arrived.put((job_id, last))

    for job_id in job_ids:
        # Daemons: a stream that is silent would keep an interrupted command alive.
        threading.Thread(target=read, args=(job_id,), daemon=True).start()
    num_open = len(job_ids)
    while num_open:
        job_id, item = arrived.get()
        if isinstance(item, StreamEvent):
            yield job_id, item
        elif item is not None:
            raise item
        else:
            num_open -= 1


def _require_success(jobs: Sequence[dict[str, Any]]) -> None:
    failures = [failure_of(job) for job in jobs if job["status"] != "succeeded"]
    if not failures:
        return
    message = "\n".join(str(failure) for failure in failures)
    remedies = dict.fromkeys(failure.remedy for failure in failures if failure.remedy)
    raise CommandError(message, remedy="; ".join(remedies), body={"jobs": list(jobs)})
