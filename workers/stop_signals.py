"""Turns signals that end a process into a command to the training loop.

Owns: the handlers of these signals while a run trains. Torch-free. Must not know:
checkpoints, other ranks.

Spot machines send SIGTERM and batch systems SIGTERM, SIGUSR1 or SIGUSR2, and wait for a
while before they kill; a terminal sends SIGINT, and SIGHUP when it is closed. The first
signal asks for a checkpoint and a stop, on which all ranks agree at a step; a second one
ends the process at once.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from megatron_ray.commands import Command

_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_REPEAT_S = 1.0
"""Seconds within which a signal is the same one, received twice: a terminal and batch
systems send it to torchrun and to its children, and torchrun passes it on."""


class StopSignals:
    """Handles the signals within a `with` block; outside of it they end the process.

    `notify` is called with a line at the first signal.
    """

    def __init__(
        self,
        notify: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notify = notify
        self._clock = clock
        self._previous: dict[signal.Signals, Any] = {}
        self._received_at = 0.0
        self.received: signal.Signals | None = None
        """The first signal; None before there was any."""

    def __enter__(self) -> Self:
        # Only the main thread may set handlers; a run in another one has none.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # Started with `nohup` or in the background, a process ignores some.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def command(self) -> Command:
        """Returns the command for the next step boundary."""
        if self.received is None:
            return Command.CONTINUE
        return Command.CHECKPOINT_AND_STOP

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if self.received is None:
            self.received = signal.Signals(number)
            self._received_at = now
            self._notify(
                f"{self.received.name}: the run saves a checkpoint after this step and ends; a "
                "second signal ends it at once"
            )
        elif now - self._received_at > _REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
