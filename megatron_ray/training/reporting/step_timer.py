"""Measures the wall time of a step and of its parts.

Owns: the loop's clock, on the host or on the device's stream; it also adds this rank's
own time to the process's record.

On CPU a part is the time of the host's monotonic clock. On CUDA the host runs ahead of
the device, so marks are events in the compute stream: they are read with the step's
numbers, one step late, and the host never waits for them.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from megatron_ray.distributed.activity import PROCESS
from megatron_ray.reports import STEP_PARTS, StepPart


@dataclass(frozen=True)
class StepTimes:
    """Seconds that a step took."""

    total_s: float
    parts_s: dict[str, float]
    """Seconds of each StepPart; they add up to the total."""

    def read(self) -> Self:
        """Returns these times, which have arrived."""
        return self


class PendingTimes(Protocol):
    """The times of a step that has been launched."""

    def read(self) -> StepTimes:
        """Returns the times; the step's numbers must have arrived before."""
        ...


class StepTimer(Protocol):
    """Splits the time of consecutive steps into parts.

    A mark ends a part: the time since the last mark counts for it, but for waits in
    collectives, which count as communication. Time that no mark names is the part
    `other`.
    """

    def mark(self, part: StepPart) -> None:
        """Ends a part of the step."""

    def finish(self) -> PendingTimes:
        """Ends the step and starts the next one; returns the times since the last end."""
        ...

    def restart(self) -> None:
        """Starts the step now, excluding the time since the last one (evaluation)."""


def step_timer(device: torch.device) -> StepTimer:
    """Returns the timer of a device."""
    if device.type == "cuda":
        return StreamTimer()
    return HostTimer()


# ---- on the host's clock


class HostTimer:
    """Measures by the host's clock, and takes its waits from the process's record."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._step_start = 0.0
        self._part_start = 0.0
        self._waited_s = 0.0
        self._parts_s: dict[StepPart, float] = {}
        self.restart()

    def mark(self, part: StepPart) -> None:
        """Ends a part of the step."""
        now = self._clock()
        elapsed_s = now - self._part_start
        self._part_start = now
        waited_s = PROCESS.waited_s
        # Most parts of a run without peers have no wait, and there may be many.
        if waited_s != self._waited_s:
            # The waits lie within the part; only rounding can make them longer.
            communication_s = min(waited_s - self._waited_s, elapsed_s)
            self._parts_s["communication"] += communication_s
            self._waited_s = waited_s
            elapsed_s -= communication_s
        self._parts_s[part] += elapsed_s

    def finish(self) -> StepTimes:
        """Ends the step and starts the next one; returns the times since the last end."""
        self.mark("other")
        total_s = self._part_start - self._step_start
        times = StepTimes(total_s, with_rest(self._parts_s, total_s))
        _record(times)
        self._start(self._part_start)
        return times

    def restart(self) -> None:
        """Starts the step now, excluding the time since the last one (evaluation)."""
        self._waited_s = PROCESS.waited_s
        self._start(self._clock())

    def _start(self, now: float) -> None:
        self._step_start = now
        self._part_start = now
        self._parts_s = dict.fromkeys(STEP_PARTS, 0.0)


# ---- on the device's stream


def timing_event() -> torch.cuda.Event:
    """Returns a new event whose time can be read."""
    return torch.cuda.Event(enable_timing=True)


class StreamTimer:
    """Measures by events in the current stream, one for each mark and two for each wait.

    A wait for a collective holds up the stream, not the host.
    """

    def __init__(self, new_event: Callable[[], torch.cuda.Event] = timing_event) -> None:
        self._new_event = new_event
        self._free: deque[torch.cuda.Event] = deque()
        self._marks: list[_Mark] = []
        self._start = self._record()
        PROCESS.on_wait = self._mark_wait

    def mark(self, part: StepPart) -> None:
        """Ends a part of the step."""
        self._marks.append((part, self._record()))

    def finish(self) -> "_StreamTimes":
        """Ends the step and starts the next one; returns the times since the last end."""
        end = self._record()
        self._marks.append(("other", end))
        times = _StreamTimes(self._start, self._marks, self._free)
        self._start = end
        self._marks = []
        return times

    def restart(self) -> None:
        """Starts the step now, excluding the time since the last one (evaluation)."""
        self._marks = []
        self._start = self._record()

    def _mark_wait(self, *, begins: bool) -> None:
        # What comes before a wait belongs to the part that the next mark ends.
        part: StepPart | None = None
        if not begins:
            part = "communication"
        self._marks.append((part, self._record()))

    def _record(self) -> torch.cuda.Event:
        if self._free:
            event = self._free.popleft()
        else:
            event = self._new_event()
        event.record()
        return event


_Mark = tuple[StepPart | None, torch.cuda.Event]
"""The part that ends at an event; None: a part that goes on after a wait."""


@dataclass(frozen=True)
class _StreamTimes:
    """Times of events that the stream has not passed yet."""

    start: torch.cuda.Event
    marks: Sequence[_Mark]
    free: deque[torch.cuda.Event]
    """Where events go that are not needed any more."""

    def read(self) -> StepTimes:
        """Returns the times, and adds them to the process's record."""
        ends = []
        for part, event in self.marks:
            ends.append((part, self.start.elapsed_time(event) / 1000))
        # The last event is the start of the next step.
        self.free.append(self.start)
        for _, event in self.marks[:-1]:
            self.free.append(event)
        times = split_at(ends)
        _record(times)
        return times


def split_at(ends: Sequence[tuple[StepPart | None, float]]) -> StepTimes:
    """Returns the times of a step with parts that end at these seconds after its start.

    Time before an end without a name counts for the next part that is no communication.
    """
    parts_s = dict.fromkeys(STEP_PARTS, 0.0)
    unnamed_s = 0.0
    last_s = 0.0
    for part, end_s in ends:
        # Events within the clock's resolution may seem to be in another order.
        elapsed_s = max(0.0, end_s - last_s)
        last_s = max(last_s, end_s)
        if part is None:
            unnamed_s += elapsed_s
        elif part == "communication":
            parts_s[part] += elapsed_s
        else:
            parts_s[part] += elapsed_s + unnamed_s
            unnamed_s = 0.0
    return StepTimes(last_s, with_rest(parts_s, last_s))


# ---- on both


def with_rest(parts_s: dict[StepPart, float], total_s: float) -> dict[str, float]:
    """Returns the parts, where `other` is what the others leave of the total."""
    parts_s["other"] = 0.0
    named_s = sum(parts_s.values())
    # Rounding may leave less than nothing.
    parts_s["other"] = max(0.0, total_s - named_s)
    return dict[str, float](parts_s.items())


def _record(times: StepTimes) -> None:
    """Adds a step to the process's record, by which ranks are compared."""
    own_s = times.total_s - times.parts_s["communication"]
    PROCESS.add_step(times.total_s, own_s)
