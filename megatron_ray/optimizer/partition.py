"""Which elements of the flat buffers a rank updates.

Owns: the `flat` strategy (equal ranges, parameter borders ignored).

Pure; torch-free. Must not know: gradients, arithmetic of the update.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ray.sharding.buckets import Bucket, BucketPlan, PlacedParameter
from megatron_ray.sharding.parameter_types import Part


@dataclass(frozen=True)
class Run:
    """A contiguous range of the flat buffers that this rank updates with one set of
    rules.
    """

    start: int
    end: int
    shard_start: int
    """Where the range begins in this rank's shard, which is its runs one after
    another."""
    decay: bool
    tp_sharded: bool
    """Whether every tp rank holds other elements here; otherwise only one of them adds
    to the global norm."""
    owns_norm: bool = True
    """Whether this pipeline stage adds to it."""


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that lies in one run."""

    placed: PlacedParameter
    start: int
    end: int
    shard_start: int


def owned_range(bucket: Bucket, dp_rank: int, dp: int, *, sharded: bool) -> tuple[int, int]:
    """What one rank updates of a bucket: its equal part under ZeRO-1, everything
    otherwise.
    """
    return bucket.shard(dp_rank, dp) if sharded else (bucket.start, bucket.end)


def flat_runs(plan: BucketPlan, dp_rank: int, dp: int, *, sharded: bool) -> tuple[Run, ...]:
    """Neighbouring parameters with the same rules make one run; alignment gaps belong
    to the run before them.
    """
    runs: list[Run] = []
    shard_start = 0
    for bucket in plan.buckets:
        low, high = owned_range(bucket, dp_rank, dp, sharded=sharded)
        for start, end, placed, part in _spans(bucket, low, high):
            rules = (
                placed.parameter.decay,
                placed.parameter.tp_sharded,
                placed.parameter.owns_norm and part.owns_norm,
            )
            if (
                runs
                and runs[-1].end == start
                and (runs[-1].decay, runs[-1].tp_sharded, runs[-1].owns_norm) == rules
            ):
                last = runs.pop()
                runs.append(Run(last.start, end, last.shard_start, *rules))
            else:
                runs.append(Run(start, end, shard_start, *rules))
            shard_start += end - start
    return tuple(runs)


def pieces(plan: BucketPlan, runs: tuple[Run, ...]) -> Iterator[Piece]:
    """Every parameter's stretches in the runs, in buffer order."""
    for placed in plan.placed:
        for run in runs:
            start = max(placed.start, run.start)
            end = min(placed.end, run.end)
            if start < end:
                yield Piece(placed, start, end, run.shard_start + start - run.start)


def _spans(
    bucket: Bucket, low: int, high: int
) -> Iterator[tuple[int, int, PlacedParameter, Part]]:
    """The parts of the bucket's parameters cut to [low, high), each stretched over the
    gap that follows it.
    """
    found = [
        (placed.part_start(part), placed, part)
        for placed in bucket.placed
        for part in placed.parameter.parts
    ]
    starts = [bucket.start, *(start for start, _, _ in found[1:]), bucket.end]
    for (_, placed, part), first, stretched in zip(
        found, starts[:-1], starts[1:], strict=True
    ):
        start = max(first, low)
        end = min(stretched, high)
        if start < end:
            yield start, end, placed, part
