"""Defines how a run leaves off at a step that breaks a rule.

Owns: the exceptions and their facts. Every rank raises the same one at the same step.
"""

from collections.abc import Mapping
from typing import ClassVar

from megatron_ray.exceptions import ErrorKind, MegatronRayError
from megatron_ray.training.progress import Progress


class RuleError(MegatronRayError):
    """A run leaves off, because a step breaks a rule or was computed wrongly.

    `progress` is that of the last good step, and the state on the device is still its
    state if `has_state`.
    """

    def __init__(
        self,
        message: str,
        progress: Progress,
        facts: Mapping[str, int] | None = None,
        *,
        has_state: bool = True,
    ) -> None:
        super().__init__(message)
        self.progress = progress
        self.has_state = has_state
        self.facts = dict(facts or {})
        """Numbers by which the run is restarted."""


class RuleStopError(RuleError):
    """A rule ends the run."""

    failure_kind: ClassVar[ErrorKind] = ErrorKind.RULE


class RollbackError(RuleError):
    """A rule has the run go on from an earlier state.

    Facts: `step`, which broke the rule; `max_step`, the last state to go on from;
    `leave_out`, the number of steps up to `step` whose samples are left out.
    """

    failure_kind: ClassVar[ErrorKind] = ErrorKind.ROLLBACK


class RecheckError(RuleError):
    """A step is to be computed again on other devices.

    Facts: `step`, and `rank`, which may have computed it wrongly.
    """

    failure_kind: ClassVar[ErrorKind] = ErrorKind.RECHECK


class RerunError(RuleError):
    """A step is to be computed again in place: `training.rules.run` catches it."""
