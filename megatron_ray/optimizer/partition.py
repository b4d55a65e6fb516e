"""Partitions the flat buffers into the ranges that each rank updates.

Owns: the `flat` strategy (equal ranges, parameter borders ignored).

Pure; torch-free. Must not know: gradients, arithmetic of the update.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.optimizer.update_rule import UpdateRule, UpdateRules
from megatron_ray.sharding.buckets import Bucket, BucketPlan, PlacedParameter
from megatron_ray.sharding.parameter_types import Part


@dataclass(frozen=True)
class Run:
    """A contiguous range of the flat buffers that this rank updates by the same rules.

    A rank's shard is the concatenation of its runs.
    """

    start: int
    end: int
    shard_start: int
    """Start of the range in this rank's shard."""
    rule: UpdateRule
    """The numbers of the update."""
    tp_sharded: bool
    """Whether tp ranks have different elements; otherwise only the first one adds its
    elements to the global norm."""
    owns_norm: bool = True
    """Whether the global norm counts this rank's copy of the elements."""
    state_start: int = 0
    """Start of the range in the state, which matrices may have apart."""

    @property
    def shard_range(self) -> slice:
        """The run's elements in this rank's shard."""
        return slice(self.shard_start, self.shard_start + self.end - self.start)

    @property
    def state_range(self) -> slice:
        """The run's elements in the state of its kind of parameters."""
        return slice(self.state_start, self.state_start + self.end - self.start)

    @property
    def of_matrix(self) -> bool:
        """Whether its state is that of matrices."""
        return self.rule.of_matrix

    def continues(self, other: "Run") -> bool:
        """Whether this run starts at the end of another one with the same rules."""
        return (
            self.start == other.end
            and self.rule == other.rule
            and self.tp_sharded == other.tp_sharded
            and self.owns_norm == other.owns_norm
        )


@dataclass(frozen=True)
class Piece:
    """The part of a parameter in one run."""

    placed: PlacedParameter
    start: int
    end: int
    shard_start: int
    """Start of the piece in this rank's shard."""
    state_start: int = 0
    """Start of the piece in the state."""
    of_matrix: bool = False
    """Whether its state is that of matrices."""

    @property
    def shard_range(self) -> slice:
        """The piece's elements in this rank's shard."""
        return slice(self.shard_start, self.shard_start + self.end - self.start)

    @property
    def state_range(self) -> slice:
        """The piece's elements in the state of its kind of parameters."""
        return slice(self.state_start, self.state_start + self.end - self.start)

    def overlap(self, part: Part) -> tuple[int, int] | None:
        """Returns the range of the buffers that this piece shares with a part.

        None without overlap. Parts are the logical tensors fused in the parameter.
        """
        part_start = self.placed.part_start(part)
        start = max(self.start, part_start)
        end = min(self.end, part_start + part.box.num_elements)
        if start >= end:
            return None
        return start, end


_Flat = TypeVar("_Flat", Run, Piece)


def cut(flat: _Flat, start: int, end: int) -> _Flat:
    """Returns a part of a run or of a piece, from `start` to `end` in the buffers."""
    shift = start - flat.start
    return replace(
        flat,
        start=start,
        end=end,
        shard_start=flat.shard_start + shift,
        state_start=flat.state_start + shift,
    )


def chunks(flats: Iterable[_Flat], most: int) -> Iterator[_Flat]:
    """Yields parts of runs or pieces, of at most so many elements each."""
    for flat in flats:
        for start in range(flat.start, flat.end, most):
            yield cut(flat, start, min(flat.end, start + most))


def owned_range(bucket: Bucket, dp_rank: int, dp: int, *, sharded: bool) -> tuple[int, int]:
    """Returns the range of a bucket that a rank updates.

    With `sharded` (ZeRO-1) it is the rank's equal part, else the whole bucket.
    """
    if sharded:
        return bucket.shard(dp_rank, dp)
    return bucket.start, bucket.end


def flat_runs(
    plan: BucketPlan, config: OptimizerConfig, dp_rank: int, dp: int, *, sharded: bool
) -> tuple[Run, ...]:
    """Returns a rank's ranges of all buckets, merged into as few runs as possible.

    Adjacent parameters with the same rules form one run, because an update costs a
    kernel launch per run.
    """
    rules = UpdateRules(config)
    runs: list[Run] = []
    shard_start = 0
    # Matrices may have other state than the rest, so each kind is counted by itself.
    state_starts = {False: 0, True: 0}
    for bucket in plan.buckets:
        owned_start, owned_end = owned_range(bucket, dp_rank, dp, sharded=sharded)
        for part_run in _part_runs(bucket, rules):
            start = max(part_run.start, owned_start)
            end = min(part_run.end, owned_end)
            if start >= end:
                continue
            of_matrix = part_run.rule.of_matrix
            run = replace(
                part_run,
                start=start,
                end=end,
                shard_start=shard_start,
                state_start=state_starts[of_matrix],
            )
            shard_start += end - start
            state_starts[of_matrix] += end - start
            if runs and run.continues(runs[-1]):
                runs[-1] = replace(runs[-1], end=end)
            else:
                runs.append(run)
    return tuple(runs)


def _part_runs(bucket: Bucket, rules: UpdateRules) -> Iterator[Run]:
    """Yields one run per part of the bucket's parameters; together they fill the bucket."""
    for parameter, part, start, end in bucket.part_ranges():
        yield Run(
            start,
            end,
            shard_start=0,
            rule=rules.of(part.logical),
            tp_sharded=parameter.tp_sharded,
            owns_norm=parameter.owns_norm and part.owns_norm,
        )


def pieces(plan: BucketPlan, runs: tuple[Run, ...]) -> Iterator[Piece]:
    """Yields the pieces of all parameters in the runs, in buffer order."""
    for placed in plan.placed:
        for run in runs:
            start = max(placed.start, run.start)
            end = min(placed.end, run.end)
            if start < end:
                yield Piece(
                    placed,
                    start,
                    end,
                    run.shard_start + start - run.start,
                    run.state_start + start - run.start,
                    run.rule.of_matrix,
                )
