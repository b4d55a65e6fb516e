"""When a checkpoint counts. Owns: collecting ranks' reports until a step is whole, and the commit itself. Torch-free.

Used by the driver under Ray and by rank 0 under torchrun, so that both commit by the same rule. Must not know: Ray, HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ray.checkpoint.directory import apply_retention, commit


@dataclass(frozen=True)
class WholeCheckpoint:
    """A checkpoint all ranks have written, with what must be stored beside it."""

    step: int
    attempt: int
    path: str
    bytes_written: int
    reports: tuple[dict[str, Any], ...]
    """Step and eval reports since the previous checkpoint, in order."""
    loss: float | None


@dataclass
class CheckpointLedger:
    """Reports of one attempt on their way to a commit."""

    world_size: int
    attempt: int
    _written: dict[int, dict[int, tuple[str, int]]] = field(default_factory=dict)
    _reports: list[dict[str, Any]] = field(default_factory=list)
    _last_step: int = 0

    def reported(self, data: dict[str, Any]) -> None:
        """A step or eval report of rank 0."""
        self._reports.append(data)
        if "loss" in data and "split" not in data:
            self._last_step = max(self._last_step, int(data["step"]))

    def written(self, rank: int, step: int, path: str, bytes_written: int) -> None:
        """A rank's part of a checkpoint is durable."""
        self._written.setdefault(step, {})[rank] = (path, bytes_written)

    def take_whole(self) -> WholeCheckpoint | None:
        """The lowest step that every rank has written and rank 0 has reported, once; None while there is none."""
        whole = [step for step, ranks in self._written.items() if len(ranks) == self.world_size and step <= self._last_step]
        if not whole:
            return None
        step = min(whole)
        ranks = self._written.pop(step)
        included = [data for data in self._reports if int(data["step"]) <= step]
        self._reports = [data for data in self._reports if int(data["step"]) > step]
        losses = [data["loss"] for data in included if "split" not in data]
        return WholeCheckpoint(
            step=step,
            attempt=self.attempt,
            path=ranks[0][0],
            bytes_written=sum(size for _, size in ranks.values()),
            reports=tuple(included),
            loss=losses[-1] if losses else None,
        )

    @property
    def waiting(self) -> bool:
        """Whether some rank has written a step that is not whole yet."""
        return bool(self._written)


def commit_whole(whole: WholeCheckpoint, storage_path: str, keep_last: int, manifest: dict[str, Any]) -> Sequence[str]:
    """Commits, then deletes what retention no longer keeps; returns the deleted paths. Raises StorageError."""
    facts = {"step": whole.step, "attempt": whole.attempt, "bytes": whole.bytes_written, "loss": whole.loss}
    commit(whole.path, {**manifest, **facts}, whole.reports)
    return list(apply_retention(storage_path, keep_last))
