"""One rank's training thread and inbox, without Ray around it."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ray.commands import Command
from megatron_ray.reports import CheckpointReport, Report, StepReport
from workers.rank.attempt import Inbox, RankAttempt
from workers.rank.environment import RankEnv
from workers.rank.messages import Fence, FencedError, Poll, RankState, StartRequest
from workers.ray.rank_worker import FenceGuard

ORDER = StartRequest(RankEnv(0, 1, 0, 1), {}, {}, attempt=1, device="cpu")


def step(n: int) -> StepReport:
    return StepReport(n, 1.0, 1.0, 0.1, 1, n, 0.1, 10.0, 0.0, 0)


def three_steps(
    order: StartRequest,
    report: Callable[[Report], None],
    poll: Callable[[], Command],
    _: object = None,
) -> str:
    for n in (1, 2, 3):
        report(step(n))
    report(CheckpointReport(3, "/c/3", 1, 0.1))
    return "finished"


def run(train: Callable[..., str], folder: Path) -> RankAttempt:
    attempt = RankAttempt(ORDER, train, folder)
    attempt.thread.start()
    attempt.thread.join(60)
    return attempt


def test_a_finished_attempt_reports_everything(tmp_path: Path) -> None:
    attempt = run(three_steps, tmp_path)
    reply = attempt.next(Poll(after=None, wait_s=0), None)
    assert [line.kind for line in reply.lines] == [
        "phase",
        "step",
        "step",
        "step",
        "checkpoint_written",
        "ended",
    ]
    assert (reply.state, reply.last_n, reply.step, reply.reports) == (
        RankState.FINISHED,
        6,
        3,
        6,
    )
    filtered = attempt.next(Poll(after=0, wait_s=0, steps=False), None)
    assert [line.kind for line in filtered.lines] == [
        "phase",
        "checkpoint_written",
        "ended",
    ]
    assert filtered.last_n == 6
    assert attempt.next(Poll(after=6, released=4, wait_s=0), None).lines == []
    assert [line.n for line in attempt.next(Poll(after=None, wait_s=0), None).lines] == [
        5,
        6,
    ], "a new driver goes on after the released"


def test_a_failed_attempt_reports_its_error(tmp_path: Path) -> None:
    def fail(*_: object) -> str:
        raise LookupError("no such thing")

    attempt = run(fail, tmp_path)
    reply = attempt.next(Poll(after=0, wait_s=0), None)
    assert reply.state is RankState.FAILED
    assert reply.error is not None
    assert (reply.error["type"], reply.error["message"]) == ("LookupError", "no such thing")
    assert "raise LookupError" in reply.error["traceback"]
    assert reply.lines[-1].kind == "failed"


def test_news_wake_a_waiting_call(tmp_path: Path) -> None:
    go = threading.Event()

    def train(
        order: StartRequest,
        report: Callable[[Report], None],
        poll: Callable[[], Command],
        _: object = None,
    ) -> str:
        go.wait(60)
        report(step(1))
        while poll() is not Command.STOP:
            time.sleep(0.01)
        return "stopped"

    attempt = RankAttempt(ORDER, train, tmp_path)
    attempt.thread.start()
    while attempt.next(Poll(after=0, wait_s=0.1), None).last_n < 1:
        pass
    started = time.monotonic()
    assert attempt.next(Poll(after=1, wait_s=0.2), None).lines == []
    assert time.monotonic() - started >= 0.2
    go.set()
    assert [line.kind for line in attempt.next(Poll(after=1, wait_s=30), None).lines] == [
        "step"
    ]
    attempt.inbox.put(Command.STOP)
    attempt.thread.join(60)
    assert attempt.next(Poll(after=2, wait_s=30), None).state is RankState.STOPPED


def test_a_request_is_taken_once_and_a_stop_stays() -> None:
    inbox = Inbox()
    assert inbox.take() is Command.CONTINUE
    inbox.put(Command.CHECKPOINT)
    assert [inbox.take(), inbox.take()] == [Command.CHECKPOINT, Command.CONTINUE]
    inbox.put(Command.CHECKPOINT_AND_STOP)
    inbox.put(Command.CHECKPOINT)
    assert [inbox.take(), inbox.take()] == [Command.CHECKPOINT_AND_STOP] * 2


def test_lower_fences_are_refused() -> None:
    guard = FenceGuard()
    for fence in (Fence(1, 1), Fence(1, 1), Fence(2, 1), Fence(2, 2), Fence(1, 3)):
        guard.admit(fence)
    for old in (Fence(9, 2), Fence(0, 3)):
        with pytest.raises(FencedError, match=r"was replaced by \(1, 3\)"):
            guard.admit(old)
