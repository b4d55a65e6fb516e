"""Interleaves two passes on one device, so that one computes while the other communicates.

Owns: the threads of two passes, and which of them runs. Must not know: what passes
compute.

Each pass has a thread, because autograd runs a backward pass inside of one call. Only
one of them runs at a time, and they switch at the same points on every rank, so that the
order of collectives is the same on all ranks.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Semaphore

import torch


@dataclass(frozen=True)
class Pass:
    """One of two passes."""

    run: Callable[[], None]
    on_enter: Callable[[], None]
    """Called when the pass begins or continues."""
    on_leave: Callable[[], None]
    """Called when the pass is interrupted or ends."""

    def run_alone(self) -> None:
        """Runs the pass without interruption."""
        self.on_enter()
        self.run()
        self.on_leave()


class _PassStoppedError(Exception):
    """Unwinds a pass whose other pass has failed."""


class Interleaver:
    """Runs pairs of passes, each of which calls `switch` while it communicates."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pair: _Pair | None = None

    def switch(self) -> None:
        """Runs the other pass until it switches back or ends.

        Does nothing outside of a pair, or when the other pass has ended.
        """
        if self._pair is not None:
            self._pair.switch()

    def run(self, first: Pass, second: Pass) -> None:
        """Runs two passes to their ends; the first one, on this thread, begins.

        Raises what one of them raises, after the other one has stopped.
        """
        pair = _Pair(first, second)
        self._pair = pair
        try:
            with ThreadPoolExecutor(1) as executor:
                running = executor.submit(self._run_second, pair)
                pair.run(0)
                running.result()
        finally:
            self._pair = None

    def _run_second(self, pair: "_Pair") -> None:
        # A new thread is on the first device of the process.
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        pair.wait_for_turn(1)
        pair.run(1)


class _Pair:
    """Two passes, of which one runs while the other waits."""

    def __init__(self, *passes: Pass) -> None:
        self._passes = passes
        self._running = 0
        self._may_run = (Semaphore(0), Semaphore(0))
        self._has_ended = [False, False]
        self._has_failed = False

    def wait_for_turn(self, index: int) -> None:
        """Waits until a pass may run."""
        self._may_run[index].acquire()

    def run(self, index: int) -> None:
        """Runs a pass to its end, unless the other one fails."""
        is_complete = False
        try:
            if not self._has_failed:
                self._passes[index].run_alone()
            is_complete = True
        except _PassStoppedError:
            # The other pass raises the reason.
            return
        finally:
            self._has_failed |= not is_complete
            self._has_ended[index] = True
            self._hand_over(1 - index)

    def switch(self) -> None:
        """Runs the other pass, if it has not ended, until this one may go on."""
        this = self._running
        if not self._has_ended[1 - this]:
            self._passes[this].on_leave()
            self._hand_over(1 - this)
            self.wait_for_turn(this)
            if not self._has_failed:
                self._passes[this].on_enter()
        if self._has_failed:
            raise _PassStoppedError

    def _hand_over(self, index: int) -> None:
        self._running = index
        self._may_run[index].release()
