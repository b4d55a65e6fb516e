"""When a checkpoint counts.

Owns: collecting ranks' reports until a step is whole, the commit itself, reading back
what it contains.

Used by the driver under Ray and by rank 0 under torchrun, so that both commit by the
same rule. Torch-free. Must not know: Ray, HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ray.checkpoint.directory import (
    apply_retention,
    commit,
    list_checkpoints,
    read_reports,
)
from megatron_ray.reports import EvalReport, StepReport
from workers.rank.spool import Line, parse_line


@dataclass(frozen=True)
class WholeCheckpoint:
    """A checkpoint all ranks have written, with what must be stored beside it."""

    step: int
    attempt: int
    path: str
    bytes_written: int
    reports: tuple[dict[str, Any], ...]
    """Rank 0's records since the previous checkpoint, as the service is told them, in
    order, and those before that it has not stored: an older checkpoint with them may be
    deleted while it is away."""
    loss: float | None


@dataclass
class CheckpointLedger:
    """Reports of one attempt on their way to a commit."""

    world_size: int
    attempt: int
    _written: dict[int, dict[int, tuple[str, int]]] = field(default_factory=dict)
    _reports: list[dict[str, Any]] = field(default_factory=list)
    _last_step: int = 0

    def reported(self, record: dict[str, Any]) -> None:
        """A record of rank 0, {kind, data, ...}."""
        self._reports.append(record)
        if record["kind"] == StepReport.kind:
            self._last_step = max(self._last_step, int(record["data"]["step"]))

    def written(self, rank: int, step: int, path: str, bytes_written: int) -> None:
        """A rank's part of a checkpoint is durable."""
        self._written.setdefault(step, {})[rank] = (path, bytes_written)

    def take_whole(self, stored: int | None = None) -> WholeCheckpoint | None:
        """The lowest step that every rank has written and rank 0 has reported, once;
        None while there is none.

        `stored`: highest number of rank 0's records that the service has; None where
        there is no service.
        """
        whole = [
            step
            for step, ranks in self._written.items()
            if len(ranks) == self.world_size and step <= self._last_step
        ]
        if not whole:
            return None
        step = min(whole)
        ranks = self._written.pop(step)
        of_steps = [
            index
            for index, record in enumerate(self._reports)
            if record["kind"] in (StepReport.kind, EvalReport.kind)
        ]
        end = max(
            (
                index + 1
                for index in of_steps
                if self._reports[index]["data"]["step"] <= step
            ),
            default=0,
        )
        included = self._reports[:end]
        again = (
            []
            if stored is None
            else [record for record in included if record["n"] > stored]
        )
        self._reports = again + self._reports[end:]
        losses = [
            record["data"]["loss"]
            for record in included
            if record["kind"] == StepReport.kind
        ]
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


def commit_whole(
    whole: WholeCheckpoint, storage_path: str, keep_last: int, manifest: dict[str, Any]
) -> Sequence[str]:
    """Commits, then deletes what retention no longer keeps; returns the deleted paths.

    Raises StorageError.
    """
    facts = {
        "step": whole.step,
        "attempt": whole.attempt,
        "bytes": whole.bytes_written,
        "loss": whole.loss,
    }
    commit(whole.path, {**manifest, **facts}, whole.reports)
    return list(apply_retention(storage_path, keep_last))


def contained_records(storage_path: str) -> dict[str, list[Line]]:
    """What the checkpoints of a job contain of rank 0's numbered records, in order, by
    source.

    Raises StorageError.

    For a driver that comes back after its node was lost: the rank's own file is gone,
    and perhaps nobody had sent it on.
    """
    found: dict[str, dict[int, Line]] = {}
    for info in list_checkpoints(storage_path):
        lines = map(parse_line, read_reports(info.path)) if info.committed else ()
        found.setdefault(source_of(info.attempt), {}).update(
            (line.n, line) for line in lines if line is not None
        )
    return {source: [lines[n] for n in sorted(lines)] for source, lines in found.items()}


def source_of(attempt: int) -> str:
    """Name of rank 0's records of an attempt."""
    return f"a{attempt}/r0"
