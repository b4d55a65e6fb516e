"""A job while it lives.

Owns: the live progress bar, and its plain lines where there is no terminal. Must not
know: commands.

`Watcher` turns stream events into lines and numbers and knows no terminal; `watch_job`
draws them.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from service.cli.failure import CommandError
from service.cli.output import (
    duration,
    nested,
    number,
    print_json_line,
    styled_level,
    styled_status,
)
from service.client import Client, StreamEvent
from workers.protocol.states import JobState

TERMINAL = frozenset(state.value for state in JobState if state.is_terminal)

_PLAIN_LINE_EVERY_S = 5.0
# weight of the newest step in the throughput that the ETA is made from
_SMOOTHING = 0.1
_STATE_EVENTS = frozenset(f"job.{state.value}" for state in JobState)


@dataclass
class Watcher:
    """What is known of a job, from its stream so far."""

    steps: int | None = None
    """Steps of the whole job."""
    tokens_per_step: int | None = None
    status: str = ""
    step: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    _smooth: float | None = field(default=None, repr=False)
    _said: str = field(default="", repr=False)

    def learn(self, job: Mapping[str, Any]) -> None:
        """Takes what a Job object says about size and progress."""
        spec = job.get("resolved_spec") or job.get("spec") or {}
        steps = nested(job, "progress.steps") or nested(spec, "training.steps")
        batch = nested(spec, "training.global_batch_size")
        length = nested(spec, "training.seq_length")
        self.steps = steps if isinstance(steps, int) else self.steps
        if isinstance(batch, int) and isinstance(length, int):
            self.tokens_per_step = batch * length

    def take(self, event: StreamEvent) -> list[str]:
        """Updates from one event; the lines (console markup) it is worth."""
        data = event.data if isinstance(event.data, Mapping) else {}
        if event.event == "metrics":
            for row in data.get("rows") or ():
                self._take_row(row)
            return []
        if event.event == "state":
            return self._take_state(data)
        message = str(data.get("message") or "")
        level = str(data.get("level"))
        if (
            event.event == "end"
            or not message
            or (not styled_level(level) and _is_detail(event.event))
        ):
            return []
        self._said = message
        style = styled_level(level) or "dim"
        return [f"[{style}]{escape(message)}[/{style}]"]

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step, from the smoothed throughput; None until a step has
        been seen.
        """
        if not self._smooth or self.steps is None or self.tokens_per_step is None:
            return None
        return max(0, self.steps - self.step) * self.tokens_per_step / self._smooth

    def numbers(self) -> str:
        """Step, loss, throughput and ETA on one line."""
        speed = f"{self.tokens_per_s:,.0f}" if self.tokens_per_s is not None else "-"
        return (
            f"step {self.step}/{self.steps or '?'}  loss {number(self.loss)}  {speed} tokens/s "
            f" ETA {duration(self.eta_s)}"
        )

    def _take_row(self, row: Mapping[str, Any]) -> None:
        if isinstance(row.get("step"), int) and row.get("loss") is not None:
            self.step = row["step"]
            self.loss = row["loss"]
        speed = row.get("tokens_per_s")
        if isinstance(speed, int | float) and speed > 0:
            self.tokens_per_s = float(speed)
            self._smooth = (
                float(speed)
                if self._smooth is None
                else (1 - _SMOOTHING) * self._smooth + _SMOOTHING * float(speed)
            )

    def _take_state(self, job: Mapping[str, Any]) -> list[str]:
        self.learn(job)
        status = str(job.get("status") or "")
        if not status or status == self.status:
            return []
        self.status = status
        text = str(job.get("message") or job.get("status_reason") or "")
        if text == self._said:
            text = ""  # the event that led here has said it
        return [f"{styled_status(status)}{f'  {escape(text)}' if text else ''}"]


def _is_detail(event_type: str) -> bool:
    """Whether `megatron-ray events` is the place for it: single ranks' doings, and
    state changes, which have lines of their own.
    """
    return event_type.startswith("rank.") or event_type in _STATE_EVENTS


def watch_job(
    client: Client, job_id: str, *, as_json: bool = False, out: Console | None = None
) -> dict[str, Any]:
    """Follows a job to its end; the job as it ended.

    Raises Failure unless it succeeded.
    """
    watcher = Watcher()
    job = client.show(job_id)
    watcher.learn(job)
    try:
        if as_json:
            _follow_json(client, job_id)
        else:
            screen = out or Console(highlight=False)
            (_follow_live if screen.is_terminal else _follow_plain)(
                client, job_id, watcher, screen
            )
    except KeyboardInterrupt:
        remedy = (
            f"`megatron-ray watch {job_id}` comes back to it, `megatron-ray cancel {job_id}` "
            "ends it"
        )
        raise CommandError(
            f"no longer watching; {job_id} goes on", remedy=remedy, exit_code=130
        ) from None
    job = client.show(job_id)
    if job["status"] != "succeeded":
        raise ended_badly(job)
    return job


def ended_badly(job: Mapping[str, Any]) -> CommandError:
    """The failure of a job that did not succeed, in the job's own words."""
    problem = job.get("problem") or {}
    lines = [
        str(
            job.get("message")
            or problem.get("detail")
            or job.get("status_reason")
            or "no reason was recorded"
        )
    ]
    lines += [
        f"  {error.get('pointer') or '/'}: {error.get('detail')}"
        for error in problem.get("errors") or ()
    ]
    remedy = (
        f"`megatron-ray logs {job['id']}` and `megatron-ray events {job['id']}` say more"
        if job["status"] == "failed"
        else ""
    )
    return CommandError(
        f"{job['id']} {job['status']}: " + "\n".join(lines), remedy=remedy, body=dict(job)
    )


def _follow_json(client: Client, job_id: str) -> None:
    for event in client.stream(job_id):
        print_json_line({"event": event.event, "id": event.id, "data": event.data})


def _follow_live(client: Client, job_id: str, watcher: Watcher, screen: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=screen, expand=True) as progress:
        task = progress.add_task(escape(job_id), total=watcher.steps, numbers="waiting")
        for event in client.stream(job_id):
            for line in watcher.take(event):
                progress.console.print(line)
            shown = watcher.numbers() if watcher.step else watcher.status
            progress.update(
                task, total=watcher.steps, completed=watcher.step, numbers=shown
            )


def _follow_plain(
    client: Client,
    job_id: str,
    watcher: Watcher,
    screen: Console,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    last_line = -_PLAIN_LINE_EVERY_S
    last_step = 0
    for event in client.stream(job_id):
        lines = watcher.take(event)
        finished = watcher.step == watcher.steps or event.event == "end"
        if watcher.step > last_step and (
            finished or clock() - last_line >= _PLAIN_LINE_EVERY_S
        ):
            lines = [watcher.numbers(), *lines]
            last_line = clock()
            last_step = watcher.step
        for line in lines:
            screen.print(line, soft_wrap=True)
        sys.stdout.flush()
