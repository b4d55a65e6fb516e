"""Records the signals that end a stack, and defines the errors of its start.

Must not know: what is started.
"""

import signal
from types import FrameType


class StackError(Exception):
    """The stack cannot be started.

    The message holds the reason and the remedy, `log_tail` the last log lines of the
    process that failed.
    """

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


class StartInterruptedError(Exception):
    """A signal arrived while the stack was starting."""


class Interruption:
    """Counts SIGINT, SIGTERM and SIGHUP after `listen`.

    The first signal ends the stack; the second one ends it without waiting for jobs.
    """

    def __init__(self) -> None:
        self.count = 0
        self.signal = signal.SIGTERM
        """The latest signal received."""

    def listen(self) -> None:
        """Installs the handlers for the rest of this process; main thread only."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Only a flag: an exception raised here could interrupt a clean-up half way.
        self.count += 1
        self.signal = signal.Signals(number)

    @property
    def is_requested(self) -> bool:
        """Whether the stack should end."""
        return self.count > 0

    @property
    def is_urgent(self) -> bool:
        """Whether the stack should end without waiting for jobs."""
        return self.count > 1
