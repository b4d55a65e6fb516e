"""Where the time of a step goes, by the host's clock and by events in a stream."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_ray.distributed.activity import PROCESS
from megatron_ray.distributed.recording import Recorded
from megatron_ray.reports import STEP_PARTS, StepPart
from megatron_ray.training.reporting.step_timer import (
    HostTimer,
    StepTimes,
    StreamTimer,
    split_at,
    step_timer,
)


class Clock:
    """A clock that moves only when work or a wait takes time."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, seconds: float) -> None:
        """Waits for another rank."""
        self.now += seconds
        PROCESS.waited_s += seconds


@pytest.fixture
def clock() -> Iterator[Clock]:
    before = PROCESS.waited_s
    yield Clock()
    PROCESS.begin()
    PROCESS.waited_s = before


def parts_of(times: StepTimes) -> dict[str, float]:
    """The parts that took any time, to the microsecond."""
    assert sum(times.parts_s.values()) == pytest.approx(times.total_s, rel=1e-6)
    assert min(times.parts_s.values()) >= 0.0
    assert list(times.parts_s) == list(STEP_PARTS)
    return {name: round(s, 6) for name, s in times.parts_s.items() if round(s, 6)}


def test_a_step_is_split_and_the_rest_is_other(clock: Clock) -> None:
    timer = HostTimer(clock)
    clock.work(0.5)  # reports of the step before
    timer.mark("other")
    clock.work(1.0)
    timer.mark("data")
    for _ in range(2):
        clock.work(2.0)
        timer.mark("forward")
        clock.work(4.0)
        timer.mark("backward")
    clock.work(0.25)
    times = timer.finish()
    assert times.total_s == pytest.approx(13.75)
    expected = {"data": 1.0, "forward": 4.0, "backward": 8.0, "other": 0.75}
    assert parts_of(times) == expected


PARTS: tuple[StepPart, ...] = ("data", "forward", "backward", "optimizer", "checkpoint")


@pytest.mark.parametrize("slow", PARTS)
@pytest.mark.parametrize("waits", [False, True])
def test_what_is_slow_shows_in_its_part_and_a_wait_within_it_in_communication(
    clock: Clock, slow: str, waits: bool
) -> None:
    timer = HostTimer(clock)
    for name in PARTS:
        clock.work(1.0)
        if name == slow and waits:
            clock.wait(9.0)
        elif name == slow:
            clock.work(9.0)
        timer.mark(name)
    expected: dict[str, float] = dict.fromkeys(PARTS, 1.0)
    if waits:
        expected["communication"] = 9.0
    else:
        expected[slow] = 10.0
    assert parts_of(timer.finish()) == expected


def test_own_time_of_the_process_leaves_out_communication(clock: Clock) -> None:
    PROCESS.begin()
    timer = HostTimer(clock)
    clock.work(2.0)
    clock.wait(6.0)
    timer.finish()
    assert (PROCESS.steps, PROCESS.step_s, PROCESS.own_s) == (1, 8.0, 2.0)


def test_an_evaluation_between_steps_is_in_none(clock: Clock) -> None:
    timer = HostTimer(clock)
    clock.work(5.0)
    clock.wait(5.0)
    timer.restart()
    clock.work(1.0)
    timer.mark("data")
    assert parts_of(timer.finish()) == {"data": 1.0}


def test_parts_add_up_whatever_the_clocks_show(clock: Clock) -> None:
    rng = random.Random(3)
    timer = HostTimer(clock)
    for _ in range(200):
        for _ in range(rng.randrange(9)):
            clock.work(rng.choice((0.0, 1e-9, 1e-5, 0.3)) * rng.random())
            # Waits by another clock may seem longer than the part they are in.
            PROCESS.waited_s += rng.choice((0.0, 1e-6)) * rng.random()
            timer.mark(rng.choice(STEP_PARTS))
        parts_of(timer.finish())


def test_the_host_measures_on_cpu() -> None:
    assert isinstance(step_timer(torch.device("cpu")), HostTimer)


# ---- events in a stream


class Event:
    """An event that the stream passes later than the host records it."""

    def __init__(self, stream: "Stream") -> None:
        self._stream = stream
        self.at = -1.0

    def record(self) -> None:
        self.at = self._stream.now

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds, as torch's."""
        return (end.at - self.at) * 1000


class Stream:
    """The device's queue: work that the host has launched takes time here only."""

    def __init__(self) -> None:
        self.now = 50.0
        self.events = 0

    def new_event(self) -> Any:
        self.events += 1
        return Event(self)

    def wait(self, seconds: float) -> None:
        """A collective for whose end the stream waits."""

        entry = Recorded.of("all_reduce")
        entry.work = Work(self, seconds)
        entry.wait()


class Work:
    """torch's handle of a collective that takes some time in the stream."""

    def __init__(self, stream: Stream, seconds: float) -> None:
        self._stream = stream
        self._seconds = seconds

    def wait(self) -> None:
        self._stream.now += self._seconds


def launch(stream: Stream, timer: StreamTimer, run: Callable[[], object]) -> Any:
    """A step of two microbatches with a wait in each backward pass."""
    timer.mark("other")
    stream.now += 1.0
    timer.mark("data")
    for _ in range(2):
        stream.now += 2.0
        timer.mark("forward")
        stream.now += 3.0
        run()
        stream.now += 1.0
        timer.mark("backward")
    stream.now += 0.5
    timer.mark("optimizer")
    return timer.finish()


def test_on_cuda_parts_are_those_of_the_stream(clock: Clock) -> None:
    PROCESS.begin()
    stream = Stream()
    timer = StreamTimer(stream.new_event)
    first = launch(stream, timer, lambda: stream.wait(4.0))
    second = launch(stream, timer, lambda: None)
    assert PROCESS.steps == 0  # not read yet
    expected = {"data": 1.0, "forward": 4.0, "backward": 8.0, "optimizer": 0.5}
    times = first.read()
    assert parts_of(times) == {**expected, "communication": 8.0}
    assert times.total_s == pytest.approx(21.5)
    assert (PROCESS.step_s, PROCESS.own_s) == pytest.approx((21.5, 13.5))
    assert parts_of(second.read()) == expected


def test_events_of_a_stream_are_used_again(clock: Clock) -> None:
    PROCESS.begin()
    stream = Stream()
    timer = StreamTimer(stream.new_event)
    for _ in range(3):
        launch(stream, timer, lambda: stream.wait(4.0)).read()
    num_events = stream.events
    times = [launch(stream, timer, lambda: stream.wait(4.0)).read() for _ in range(9)]
    assert stream.events == num_events
    assert {time.total_s for time in times} == {21.5}


def test_a_restart_leaves_out_the_waits_of_an_evaluation(clock: Clock) -> None:
    PROCESS.begin()
    stream = Stream()
    timer = StreamTimer(stream.new_event)
    stream.now += 7.0
    stream.wait(3.0)
    timer.restart()
    stream.now += 2.0
    timer.mark("data")
    assert parts_of(timer.finish().read()) == {"data": 2.0}


def test_events_closer_than_the_devices_clock_leave_no_negative_part() -> None:
    times = split_at([("data", 1.0), (None, 0.9999995), ("other", 1.5)])
    assert parts_of(times) == {"data": 1.0, "other": 0.5}
