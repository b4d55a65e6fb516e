"""Why a stack ends before it should.

Owns: signals as a flag, and the two errors of a start. Must not know: what is started.
"""

import signal
from types import FrameType


class StackError(Exception):
    """The stack cannot be started; the message says why and what to do, `log_tail` what
    the responsible process wrote last.
    """

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


class StartInterruptedError(Exception):
    """A signal came while the stack was starting."""


class Interruption:
    """Counts SIGINT, SIGTERM and SIGHUP from `listen` on; the first ends the stack, the
    second ends it without waiting for jobs.
    """

    def __init__(self) -> None:
        self.count = 0
        self.signal = signal.SIGTERM
        """The newest one heard."""

    def listen(self) -> None:
        """Takes the three signals over for the rest of this process; main thread only."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.signal = signal.Signals(number)

    @property
    def asked(self) -> bool:
        """Whether to end."""
        return self.count > 0

    @property
    def urgent(self) -> bool:
        """Whether to end without grace."""
        return self.count > 1
