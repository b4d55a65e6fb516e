"""Ways out of a job's road through its phases.

Owns: these exceptions. Must not know: who takes them.
"""

from workers.driver.journal import Ending
from workers.exceptions import WorkersError
from workers.protocol.states import JobState, StatusReason


class JobEnds(Exception):
    """Ends the road through the phases; carries how."""

    def __init__(
        self,
        state: JobState,
        reason: StatusReason | None = None,
        message: str = "",
        *,
        told: bool = False,
    ) -> None:
        super().__init__(message)
        self.ending = Ending(
            state=state.value,
            reason=reason.value if reason else None,
            message=message,
            told=told,
        )


class DriverReplacedError(WorkersError):
    """A newer incarnation drives this job."""


class BackToQueue(Exception):
    """The resources are given back; the job waits until it is wanted again at a
    revision above `revision`.
    """

    def __init__(
        self, state: JobState, reason: StatusReason | None, message: str, revision: int
    ) -> None:
        super().__init__(message)
        self.state = state
        self.reason = reason
        self.revision = revision
