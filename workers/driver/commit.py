"""Decides when a checkpoint is complete, commits it, and reads its records back.

Owns: collecting the ranks' reports until a step is whole, the commit itself. Torch-free.
Must not know: Ray, HTTP.

Used by the driver under Ray and by rank 0 under torchrun, so that both follow the same
rule.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ray.checkpoint.directory import (
    RunIdentity,
    commit,
    list_checkpoints,
    read_reports,
)
from megatron_ray.checkpoint.retention import apply_retention
from megatron_ray.reports import EvalReport, MonitorReport, StepReport
from megatron_ray.storage.storage import Storage, open_storage
from workers.rank.spool import Line, parse_line


@dataclass(frozen=True)
class WholeCheckpoint:
    """A checkpoint that all ranks have written, with the files stored beside it."""

    step: int
    attempt: int
    path: str
    bytes_written: int
    reports: tuple[dict[str, Any], ...]
    """Rank 0's records since the previous checkpoint, in order, preceded by older ones
    that the service has not stored: the older checkpoint that has them may be deleted
    before the service is back."""
    loss: float | None


@dataclass
class CheckpointLedger:
    """Collects the reports of one attempt until a checkpoint can be committed."""

    world_size: int
    attempt: int
    _written: dict[int, dict[int, tuple[str, int]]] = field(default_factory=dict)
    """Path and bytes of each rank's part, by step and rank."""
    _reports: list[dict[str, Any]] = field(default_factory=list)
    _last_step: int = 0

    def reported(self, record: dict[str, Any]) -> None:
        """Adds a record of rank 0, {kind, data, ...}."""
        self._reports.append(record)
        if record["kind"] == StepReport.kind:
            self._last_step = max(self._last_step, int(record["data"]["step"]))

    def written(self, rank: int, step: int, path: str, bytes_written: int) -> None:
        """Adds a rank's part of a checkpoint, which is durable."""
        self._written.setdefault(step, {})[rank] = (path, bytes_written)

    def take_whole(self, stored: int | None = None) -> WholeCheckpoint | None:
        """Returns the lowest step that is whole, once; None while there is none.

        A step is whole when every rank has written it and rank 0 has reported it.
        `stored` is the highest number of rank 0's records that the service has; None
        where there is no service.
        """
        step = self._lowest_whole_step()
        if step is None:
            return None
        parts = self._written.pop(step)
        included = self._reports[: self._end_of(step)]
        following = self._reports[len(included) :]
        # Records that the service lacks are also added to the next checkpoint:
        # retention may delete this one before the service is reachable.
        unstored = []
        if stored is not None:
            unstored = [record for record in included if record["n"] > stored]
        self._reports = unstored + following
        loss = None
        for record in included:
            if record["kind"] == StepReport.kind:
                loss = _finite_or_none(record["data"]["loss"])
        return WholeCheckpoint(
            step=step,
            attempt=self.attempt,
            path=parts[0][0],
            bytes_written=sum(size for _, size in parts.values()),
            reports=tuple(included),
            loss=loss,
        )

    def _lowest_whole_step(self) -> int | None:
        # In order, so that each checkpoint gets the reports since the one before it.
        for step in sorted(self._written):
            if len(self._written[step]) == self.world_size and step <= self._last_step:
                return step
        return None

    def _end_of(self, step: int) -> int:
        """Returns the index after the last report with numbers of a step up to `step`.

        Events in between are included, so that the numbers have no gaps.
        """
        end = 0
        kinds = (StepReport.kind, EvalReport.kind, MonitorReport.kind)
        for index, record in enumerate(self._reports):
            is_metric = record["kind"] in kinds
            if is_metric and record["data"]["step"] <= step:
                end = index + 1
        return end

    @property
    def is_waiting(self) -> bool:
        """Whether some rank has written a step that is not whole yet."""
        return bool(self._written)


def _finite_or_none(loss: float) -> float | None:
    """Returns the loss, or None for a skipped step: JSON has no NaN."""
    if math.isfinite(loss):
        return loss
    return None


def commit_whole(
    whole: WholeCheckpoint,
    storage_path: str,
    keep_last: int,
    manifest: dict[str, Any],
    open_storage: Callable[[str], Storage] = open_storage,
) -> Sequence[str]:
    """Commits a checkpoint, then deletes those that retention no longer keeps.

    Only checkpoints of the run that `manifest` names are deleted. Returns their paths.
    Raises StorageError.
    """
    # A repeated commit changes nothing, so after a driver died between commit and
    # retention its successor can simply repeat both.
    facts = {
        "step": whole.step,
        "attempt": whole.attempt,
        "bytes": whole.bytes_written,
        "loss": whole.loss,
    }
    commit(
        whole.path, {**manifest, **facts}, whole.reports, storage=open_storage(whole.path)
    )
    run = RunIdentity.of_manifest(manifest)
    return list(apply_retention(storage_path, keep_last, run))


def contained_records(storage_path: str) -> dict[str, list[Line]]:
    """Returns rank 0's numbered records in a job's checkpoints, in order, by source.

    For a driver that restarts after its node was lost: the rank's own file is lost, and
    perhaps none of its records had been sent. Raises StorageError.
    """
    by_source: dict[str, dict[int, Line]] = {}
    # Later checkpoints repeat records that the service had not stored; keyed by number,
    # each is kept once.
    for info in list_checkpoints(storage_path):
        by_source.setdefault(source_of(info.attempt), {})
        if info.committed:
            for report in read_reports(info.path):
                line = parse_line(report)
                # Under torchrun records have no numbers; there is no service to send to.
                if line is not None:
                    # An attempt that continues from copies has reports of an earlier one.
                    attempt = line.value().get("attempt", info.attempt)
                    by_source.setdefault(source_of(attempt), {})[line.n] = line
    ordered = {}
    for source, lines in by_source.items():
        ordered[source] = [lines[n] for n in sorted(lines)]
    return ordered


def source_of(attempt: int) -> str:
    """Returns the name under which rank 0's records of an attempt are numbered."""
    return f"a{attempt}/r0"
