"""The watcher's numbers and lines, and the progress bar on a terminal."""

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from service.cli.commands.demo import closing_lines
from service.cli.commands.watch import Watcher, failure_of, watch_job
from service.cli.failure import CommandError
from service.cli.output import duration
from service.client import Client
from service.event_stream import StreamEvent
from service.local_stack.record import StackRecord

JOB: dict[str, Any] = {
    "id": "job-abc",
    "status": "running",
    "progress": {"steps": 100},
    "resolved_spec": {
        "training": {"steps": 100, "global_batch_size": 16, "seq_length": 256}
    },
}


def row(step: int, **values: Any) -> StreamEvent:
    return StreamEvent(
        "metrics",
        f"0.{step}",
        {
            "rows": [
                {"step": step, "attempt": 1, "loss": 3.0, "tokens_per_s": 4096.0, **values}
            ]
        },
    )


def test_eta_comes_from_smoothed_throughput() -> None:
    watcher = Watcher()
    watcher.update_job(JOB)
    assert watcher.eta_s is None
    watcher.handle_event(row(40))
    assert watcher.eta_s == pytest.approx(60 * 4096 / 4096)
    watcher.handle_event(row(41, tokens_per_s=40960.0))
    assert watcher.eta_s == pytest.approx(59 * 4096 / (0.9 * 4096 + 0.1 * 40960))
    assert watcher.progress_line() == "step 41/100  loss 3.0000  40,960 tokens/s  ETA 0:31"


def test_eta_counts_the_smaller_batches_of_a_ramp_up() -> None:
    watcher = Watcher()
    rampup = {"start": 4, "increment": 4, "samples": 80}
    training = {"global_batch_size": 16, "seq_length": 256, "rampup_batch_size": rampup}
    watcher.update_job({**JOB, "resolved_spec": {"training": {**training, "steps": 100}}})
    watcher.handle_event(row(5))
    # 4 samples in 7 steps, 8 in 4, 12 in 2, then 16.
    assert watcher.eta_s == pytest.approx((8 + 32 + 24 + 16 * 87) * 256 / 4096)


def test_a_resumed_job_steps_back() -> None:
    watcher = Watcher()
    watcher.update_job(JOB)
    watcher.handle_event(row(60))
    watcher.handle_event(row(51))
    assert watcher.step == 51


def test_state_changes_are_lines_and_repeats_are_not() -> None:
    watcher = Watcher()
    state = StreamEvent("state", None, {**JOB, "message": "2 ranks on [node-1]"})
    assert watcher.handle_event(state) == ["[cyan]running[/cyan]  2 ranks on \\[node-1]"]
    assert watcher.handle_event(state) == []
    assert watcher.handle_event(
        StreamEvent(
            "state", None, {**JOB, "status": "recovering", "status_reason": "worker_died"}
        )
    ) == ["recovering  worker_died"]


def test_evaluation_rows_without_loss_do_not_hide_the_loss() -> None:
    watcher = Watcher()
    watcher.handle_event(row(10))
    watcher.handle_event(
        StreamEvent(
            "metrics", "0.11", {"rows": [{"step": 10, "attempt": 1, "val_loss": 2.0}]}
        )
    )
    assert (watcher.step, watcher.loss) == (10, 3.0)


def test_details_and_repetitions_are_left_to_the_events_command() -> None:
    watcher = Watcher()
    assert (
        watcher.handle_event(
            StreamEvent(
                "rank.phase", "1.0", {"message": "model took 0.8 s", "level": "info"}
            )
        )
        == []
    )
    assert watcher.handle_event(
        StreamEvent("rank.died", "2.0", {"message": "rank 1 died", "level": "error"})
    ) == ["[red]rank 1 died[/red]"]
    assert (
        watcher.handle_event(
            StreamEvent("job.queued", "3.0", {"message": "ready to run", "level": "info"})
        )
        == []
    )
    assert watcher.handle_event(
        StreamEvent("job.admitted", "4.0", {"message": "2 ranks", "level": "info"})
    ) == ["[dim]2 ranks[/dim]"]
    assert watcher.handle_event(
        StreamEvent("state", None, {**JOB, "status": "queued", "message": "2 ranks"})
    ) == ["queued"]


def test_removed_checkpoints_are_shown_with_verbose_only() -> None:
    event = StreamEvent(
        "checkpoint.deleted", "1.0", {"message": "removed checkpoint 30", "level": "info"}
    )
    assert Watcher().handle_event(event) == []
    assert Watcher(verbose=True).handle_event(event) == ["[dim]removed checkpoint 30[/dim]"]


def test_unknown_events_are_ignored_or_printed_by_level() -> None:
    watcher = Watcher()
    assert (
        watcher.handle_event(StreamEvent("something.new", "1.0", {"no": "message"})) == []
    )
    assert watcher.handle_event(StreamEvent("something.new", "1.0", ["no mapping"])) == []
    assert watcher.handle_event(
        StreamEvent("job.warned", "2.0", {"message": "slow disk", "level": "warn"})
    ) == ["[yellow]slow disk[/yellow]"]


class ScriptedClient(Client):
    """A client whose job has this stream."""

    def __init__(self, *events: StreamEvent, status: str = "succeeded") -> None:
        self.script = events
        self.status = status

    def show(self, job_id: str) -> dict[str, Any]:
        return {**JOB, "status": self.status}

    def stream(
        self, job_id: str, *, last_event_id: str | None = None, give_up_after_s: float = 0
    ) -> Iterator[StreamEvent]:
        yield from self.script


def test_a_terminal_shows_a_bar_and_the_lines_above_it() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, highlight=False)
    events = (
        StreamEvent("state", None, {**JOB, "status": "running"}),
        row(50),
        row(100),
        StreamEvent("end", "1.100", {}),
    )
    watch_job(ScriptedClient(*events), "job-abc", out=console)
    shown = screen.getvalue()
    assert "running" in shown
    assert "━" in shown
    assert "step 100/100  loss 3.0000  4,096 tokens/s  ETA 0:00" in shown


def test_a_job_that_does_not_succeed_is_an_error_with_its_cause() -> None:
    with pytest.raises(CommandError, match="job-abc cancelled: no reason was recorded"):
        watch_job(
            ScriptedClient(status="cancelled"), "job-abc", out=Console(file=io.StringIO())
        )
    problem = {
        "detail": "bad data",
        "errors": [{"pointer": "/data/train/0/path", "detail": "empty; add text"}],
    }
    failure = failure_of({**JOB, "status": "failed", "problem": problem})
    assert str(failure) == "job-abc failed: bad data\n  /data/train/0/path: empty; add text"


def test_demo_prints_losses_checkpoint_and_sample() -> None:
    record = StackRecord(
        stack_id="s",
        boot_id="b",
        pid_namespace=1,
        up_pid=1,
        up_start_ticks=1,
        temp_dir="/tmp/mr-x",
        data_dir="/runs/demo",
        url="http://127.0.0.1:1",
        dashboard_url="http://127.0.0.1:2",
    )
    job = {
        **JOB,
        "progress": {"val_loss": 3.25, "unigram_nats": 6.5},
        "last_checkpoint": {"path": "/runs/demo/c", "step": 200},
    }
    text = "\n".join(closing_lines(job, record, 3 << 20, "x" * 300))
    for expected in (
        "3.250",
        "6.500",
        "gain               [bold]3.250",
        "/runs/demo/c (step 200, 3.0 MiB)",
        "http://127.0.0.1:1/v1/jobs/job-abc",
    ):
        assert expected in text
    assert text.count("x") == 300 + record.dashboard_url.count("x")


def test_the_bar_keeps_its_width_beside_the_numbers_of_a_long_job() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, highlight=False)
    steps = {"training": {"steps": 2_000_000, "global_batch_size": 512, "seq_length": 4096}}
    job = {**JOB, "progress": {"steps": 2_000_000}, "resolved_spec": steps}
    events = (
        StreamEvent("state", None, job),
        row(1_234_567, tokens_per_s=4_321_000.0),
        StreamEvent("end", "1.100", {}),
    )
    watch_job(ScriptedClient(*events), "job-abcdefghijkl", out=console)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    numbers = "step 1234567/2000000  loss 3.0000  4.32M tokens/s  ETA 4d 7h"
    bars = [line for line in re.split(r"[\r\n]+", text) if numbers in line]
    assert bars
    assert bars[-1].index(numbers) == 17  # 16 cells of the bar and a space
    assert len(bars[-1].rstrip()) <= 80


def test_a_history_reads_in_its_order(capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    console = Console(file=screen, highlight=False, width=200)
    committed = {"message": "checkpoint of step 50 committed", "level": "info"}
    events = (
        StreamEvent("job.created", "1", {"message": "job created", "level": "info"}),
        row(50),
        StreamEvent("checkpoint.committed", "2", committed),
        row(100),
        StreamEvent("end", "3", {}),
    )
    watch_job(ScriptedClient(*events), "job-abc", out=console)
    lines = screen.getvalue().splitlines()
    starts = [line.split("  ")[0] for line in lines]
    expected = [
        "job created",
        "step 50/100",
        "checkpoint of step 50 committed",
        "step 100/100",
    ]
    assert starts == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59, "0:59"), (3_661, "1:01:01"), (400_000, "4d 15h"), (None, "-:--")],
)
def test_durations_are_short(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
