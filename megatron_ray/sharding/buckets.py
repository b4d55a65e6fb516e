"""Plans the layout of parameters in flat buffers, and the buckets of the buffers.

The plan depends only on the parameter table and on sizes, never on the order in which
gradients arrive, so that sums are reproducible. Torch-free. Must not know: gradients,
groups.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from megatron_ray.sharding.parameter_types import LocalParameter, Part

# Alignment of parameters in elements: 256 bytes in fp32, which suits vector units and copy
# engines.
ALIGNMENT = 64


@dataclass(frozen=True)
class PlacedParameter:
    """One parameter's range in the flat buffers."""

    parameter: LocalParameter
    start: int

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + prod(self.parameter.shape)

    def part_start(self, part: Part) -> int:
        """Returns the first element of one of its parts."""
        return self.start + part.start * prod(self.parameter.shape[1:])


@dataclass(frozen=True)
class Bucket:
    """A contiguous range that one collective reduces; its length is a multiple of dp."""

    index: int
    start: int
    end: int
    placed: tuple[PlacedParameter, ...]

    def shard(self, dp_rank: int, dp: int) -> tuple[int, int]:
        """Returns the range that one data-parallel rank owns under ZeRO-1."""
        # Split by elements, not by parameters, so that all shards of a bucket have equal
        # size and one reduce-scatter suffices.
        length = (self.end - self.start) // dp
        start = self.start + dp_rank * length
        return start, start + length

    def part_ranges(self) -> Iterator[tuple[LocalParameter, Part, int, int]]:
        """Yields the parts of the bucket's parameters with ranges that fill the bucket.

        Gaps (alignment, padding rows, rounding of the bucket) belong to the previous part.
        They are always zero, and without gaps neighbours can form one run.
        """
        parts: list[tuple[PlacedParameter, Part]] = []
        for placed in self.placed:
            parts.extend((placed, part) for part in placed.parameter.parts)
        for index, (placed, part) in enumerate(parts):
            end = self.end
            if index + 1 < len(parts):
                next_placed, next_part = parts[index + 1]
                end = next_placed.part_start(next_part)
            yield placed.parameter, part, placed.part_start(part), end


@dataclass(frozen=True)
class BucketPlan:
    """Buckets in the order in which a backward pass completes them.

    Frozen parameters follow after them.
    """

    buckets: tuple[Bucket, ...]
    frozen: tuple[PlacedParameter, ...] = ()

    @property
    def num_trainable(self) -> int:
        """Length of the flat gradients."""
        if not self.buckets:
            return 0
        return self.buckets[-1].end

    @property
    def num_elements(self) -> int:
        """Length of the flat parameters."""
        if not self.frozen:
            return self.num_trainable
        return self.frozen[-1].end

    @property
    def placed(self) -> Sequence[PlacedParameter]:
        """Every parameter's range, in the order of the buffer."""
        placed: list[PlacedParameter] = []
        for bucket in self.buckets:
            placed.extend(bucket.placed)
        placed.extend(self.frozen)
        return placed


def default_bucket_elements(dp: int, trainable: int) -> int:
    """Returns the bucket size for a model with `trainable` elements.

    Megatron's max(40e6, 1e6 x dp), large enough for bandwidth. In small models an
    eighth of the elements, because a single bucket could not overlap with the backward
    pass, but at least 1e6 x dp, below which a ring is bound by latency.
    """
    smallest = 1_000_000 * dp
    return min(max(40_000_000, smallest), max(trainable // 8, smallest))


def plan_buckets(
    parameters: Iterable[LocalParameter], dp: int, bucket_elements: int | None = None
) -> BucketPlan:
    """Splits parameters into buckets in reverse table order.

    A backward pass runs from the head to the embedding, so it completes buckets in this
    order. `bucket_elements`: the size at which a bucket is closed; None: chosen by the
    size of the model.
    """
    table = list(parameters)
    trainable = []
    num_elements = 0
    for parameter in reversed(table):
        if parameter.trainable:
            trainable.append(parameter)
            num_elements += prod(parameter.shape)
    # Only trainable elements count, since frozen ones have no gradients.
    limit = bucket_elements or default_bucket_elements(dp, num_elements)
    cutter = _Cutter(dp)
    for parameter in trainable:
        # A parameter that two pipeline stages share has its own bucket, so that its ZeRO-1
        # shards are the same rows on both stages.
        if parameter.is_shared_embedding:
            cutter.close()
        cutter.place(parameter)
        if cutter.num_elements >= limit or parameter.is_shared_embedding:
            cutter.close()
    cutter.close()
    # After all buckets, so that the flat gradients simply end before them.
    frozen = _place_frozen(table, cutter.end)
    return BucketPlan(tuple(cutter.buckets), frozen)


class _Cutter:
    """Places parameters one after another and closes buckets."""

    def __init__(self, dp: int) -> None:
        self._dp = dp
        self._start = 0
        self._placed: list[PlacedParameter] = []
        self.end = 0
        """Offset at which the next parameter starts."""
        self.buckets: list[Bucket] = []

    @property
    def num_elements(self) -> int:
        """Length of the open bucket so far."""
        return self.end - self._start

    def place(self, parameter: LocalParameter) -> None:
        """Appends a parameter to the open bucket."""
        placed = PlacedParameter(parameter, self.end)
        self._placed.append(placed)
        self.end = _round_up(placed.end, ALIGNMENT)

    def close(self) -> None:
        """Closes the open bucket unless it is empty."""
        if not self._placed:
            return
        # The parts of the dp ranks are equal and aligned.
        self.end = self._start + _round_up(self.num_elements, ALIGNMENT * self._dp)
        bucket = Bucket(len(self.buckets), self._start, self.end, tuple(self._placed))
        self.buckets.append(bucket)
        self._start = self.end
        self._placed = []


def _place_frozen(
    table: Sequence[LocalParameter], start: int
) -> tuple[PlacedParameter, ...]:
    frozen = []
    for parameter in table:
        if not parameter.trainable:
            placed = PlacedParameter(parameter, start)
            frozen.append(placed)
            start = _round_up(placed.end, ALIGNMENT)
    return tuple(frozen)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
