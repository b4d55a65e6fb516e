"""Classifies an actor's death from Ray's error.

Owns: reading Ray's error types and texts. Must not know: ranks, HTTP, torch, what follows
a death.
"""

from dataclasses import dataclass

from ray.exceptions import RayActorError, RayError, RayTaskError

from workers.decisions.failures import FailureKind
from workers.rank.messages import FencedError

_NODE_LOST_TEXTS = ("node has died", "node is dead", "node was terminated")
_NODE_MEMORY_TEXTS = ("running low on memory", "OutOfMemory")
_KILLED_TEXT = "connection error code 2. End of file"
"""Ray's complete text about a process that was killed by a signal."""
_EXIT_DETAIL = "Worker exit detail:"
_REASON_MARKS = (_EXIT_DETAIL, "The actor died because", "The actor is dead because")
_ADVICE = "Some common causes"
"""Start of general advice that Ray appends to a reason."""


@dataclass(frozen=True)
class Death:
    """The death of an actor, as reported by Ray."""

    kind: FailureKind
    message: str


def raise_if_fenced(error: RayTaskError) -> None:
    """Raises the FencedError that a worker raised for an old fence, if Ray wraps one."""
    if isinstance(error.cause, FencedError):
        raise error.cause from error


def death_of(error: RayError) -> Death:
    """Returns the kind of an actor's death and the relevant part of Ray's message."""
    text = str(error)
    message = _reason(text) or f"process died: {type(error).__name__}"
    # A preempted node is also reported as dead, so the more specific kind is tested first.
    if isinstance(error, RayActorError) and error.preempted:
        return Death(FailureKind.PREEMPTED, f"node preempted: {message}")
    if _contains_any(text, _NODE_LOST_TEXTS):
        return Death(FailureKind.NODE_LOST, message)
    if _contains_any(text, _NODE_MEMORY_TEXTS):
        return Death(
            FailureKind.NODE_MEMORY,
            f"Ray killed the process because the node was running out of memory: {message}",
        )
    return Death(FailureKind.PROCESS_DIED, message)


def _contains_any(text: str, parts: tuple[str, ...]) -> bool:
    return any(part in text for part in parts)


def _reason(text: str) -> str | None:
    """Returns the first reason in Ray's text, without its advice; None if there is none."""
    # Ray's text is about the error code of a connection, which does not help users.
    if _KILLED_TEXT in text:
        return "process killed or crashed (possibly out of memory)"
    # Ray puts class, ids and addresses on other lines of the text.
    for line in text.splitlines():
        for mark in _REASON_MARKS:
            if mark not in line:
                continue
            reason, _, _ = line[line.index(mark) :].partition(_ADVICE)
            reason = reason.removeprefix(_EXIT_DETAIL).strip()
            if "process" in reason.lower()[:20]:
                return reason
            return f"process died: {reason}"
    return None
