"""Finds the copies in the ranks' memory from which the next attempt continues.

Owns: what the driver asks the processes, and what it records of the answer. Must not
know: which set is chosen, how copies are loaded, HTTP, torch.
"""

from collections.abc import Mapping, Sequence

from megatron_ray.parallel_dims import ParallelDims
from workers.decisions.peers.copies import CopyFacts, CopySet, choose_copies, layout_of
from workers.decisions.placement import RankPlace
from workers.driver.commit import source_of
from workers.driver.context import JobContext
from workers.driver.relay import to_record
from workers.protocol.job import JobSpec
from workers.rank.spool import Line

_ANSWER_S = 5.0


class CopyChoice:
    """The copies of one job's ranks, as the driver finds them between two attempts."""

    def __init__(self, job: JobContext) -> None:
        self._job = job
        self._group = job.ports.group

    def find(self, dp: int | None) -> CopySet | None:
        """Returns the newest copies of all ranks, unless the checkpoint is newer.

        `dp` is the size of the next attempt where it is not that of the spec. Passes on
        rank 0's reports up to them, which only its copy may have. Storage is not read.
        Raises FencedError.
        """
        job = self._job
        entry = job.entry
        # Processes that have ended or are new have no copies.
        if not job.keeps_copies or not self._group.slots:
            return None
        spec = entry.model_copy(update={"dp": dp}).attempt_spec
        assert spec is not None
        assert entry.prepared is not None
        kept = self._group.copies(job.fence, _ANSWER_S)
        world_size = ParallelDims.of(JobSpec.from_mapping(spec).parallel).world_size
        layout = layout_of(spec, entry.prepared, world_size)
        min_step = max(1, entry.last_commit)
        copies = choose_copies(kept, layout, world_size, min_step, entry.rollbacks)
        if copies is not None:
            self._relay_reports(copies)
        elif _are_missing(kept, layout, world_size):
            message = (
                "no step has copies of all ranks in the processes that are left; the next "
                "attempt starts from storage"
            )
            job.records.event("peer_copies.incomplete", message, "warn")
        return copies

    def confirm(self, places: Sequence[RankPlace]) -> CopySet | None:
        """Returns the chosen copies if all processes that have them are ranks."""
        copies = self._job.entry.copies
        slots = set()
        for place in places:
            slots.add(place.slot)
        if copies is None or slots.issuperset(copies.holders):
            return copies
        message = (
            f"a process with copies of step {copies.step} is no rank of this attempt, which "
            "therefore starts from storage"
        )
        self._job.records.event("peer_copies.incomplete", message, "warn")
        return None

    def _relay_reports(self, copies: CopySet) -> None:
        slot = copies.holders[0]
        lines = self._group.copied_reports(slot, self._job.fence, copies, _ANSWER_S)
        source = source_of(copies.attempt)
        following = lines_after(lines, self._job.ports.outbox.last(source))
        self._job.ports.outbox.relay(source, map(to_record, following))


def lines_after(lines: Sequence[Line], last_n: int) -> Sequence[Line]:
    """Returns the lines after `last_n`; none after a gap, which the service refuses."""
    following = [line for line in lines if line.n > last_n]
    if following and following[0].n != last_n + 1:
        return []
    return following


def _are_missing(
    kept: Mapping[int, Sequence[CopyFacts]], layout: str, world_size: int
) -> bool:
    """Whether there are copies, and none of a step is complete, new or old."""
    layouts = set()
    for copies in kept.values():
        for copy in copies:
            layouts.add(copy.layout)
    return layout in layouts and choose_copies(kept, layout, world_size, 0) is None
