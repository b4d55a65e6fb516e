"""Records the rollbacks of a run beside its checkpoints.

Owns: the file, which checkpoints a rollback leaves behind, and the steps whose samples
are left out for it. Torch-free. Must not know: why a run is rolled back.

The record is written before the run goes on, so that every later start of the run, by
whatever road, leaves the same samples out and passes over the same checkpoints.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ray.storage.storage import Storage

FILE = "rollbacks.json"
"""Name of the file in the folder of all checkpoints."""


@dataclass(frozen=True)
class Rollback:
    """One rollback of a run."""

    attempt: int
    """The attempt that was rolled back."""
    step: int
    """Last step whose samples are left out."""
    leave_out: int
    """Number of steps, up to that one, whose samples are left out."""
    max_step: int
    """Last step whose state is used; later states of this and earlier attempts are left
    behind."""
    message: str = ""
    """Why the run was rolled back."""

    @property
    def left_out(self) -> range:
        """Steps whose samples are left out."""
        return range(self.step - self.leave_out + 1, self.step + 1)

    def leaves_behind(self, attempt: int, step: int) -> bool:
        """Whether a state after a step of an attempt is not to be used any more."""
        return attempt <= self.attempt and step > self.max_step


def steps_left_out(rollbacks: Iterable[Rollback]) -> tuple[int, ...]:
    """Returns all steps whose samples are left out, in order."""
    steps: set[int] = set()
    for rollback in rollbacks:
        steps.update(rollback.left_out)
    return tuple(sorted(steps))


def is_left_behind(rollbacks: Iterable[Rollback], attempt: int, step: int) -> bool:
    """Whether any rollback leaves a state behind."""
    return any(rollback.leaves_behind(attempt, step) for rollback in rollbacks)


def with_rollback(
    rollbacks: Sequence[Rollback], rollback: Rollback
) -> tuple[Rollback, ...]:
    """Returns the rollbacks with one more; an attempt is rolled back once."""
    others = [other for other in rollbacks if other.attempt != rollback.attempt]
    return (*others, rollback)


def read_rollbacks(storage: Storage, folder: str) -> tuple[Rollback, ...]:
    """Returns the rollbacks recorded in a folder of checkpoints that has a record.

    Raises StorageError, and ValueError or TypeError for a record that cannot be read.
    """
    body: dict[str, Any] = json.loads(storage.read_bytes(f"{folder}/{FILE}"))
    return tuple(Rollback(**item) for item in body["rollbacks"])


def write_rollbacks(storage: Storage, folder: str, rollbacks: Iterable[Rollback]) -> None:
    """Replaces the record, durably. Raises StorageError."""
    body = {"rollbacks": [asdict(rollback) for rollback in rollbacks]}
    storage.write_bytes_atomic(f"{folder}/{FILE}", json.dumps(body, indent=2).encode())
