"""Which parameter lies where in the flat buffers, and how they are cut into buckets.

Owns: that plan, a pure function of the spec.

Never of arrival order, so that sums are the same in every run. Torch-free. Must not
know: gradients, groups.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from megatron_ray.sharding.parameter_types import LocalParameter, Part

# Start of every parameter in elements: 256 bytes in fp32, what vector units and copy
# engines like.
ALIGNMENT = 64


@dataclass(frozen=True)
class Placed:
    """One parameter's range in the flat buffers."""

    parameter: LocalParameter
    start: int

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + prod(self.parameter.shape)

    def part_start(self, part: Part) -> int:
        """First element of one of its parts."""
        return self.start + part.start * prod(self.parameter.shape[1:])


@dataclass(frozen=True)
class Bucket:
    """A contiguous range that is reduced at once; its length is a multiple of dp."""

    index: int
    start: int
    end: int
    placed: tuple[Placed, ...]

    def shard(self, dp_rank: int, dp: int) -> tuple[int, int]:
        """The equal part that one data-parallel rank owns under ZeRO-1."""
        length = (self.end - self.start) // dp
        return self.start + dp_rank * length, self.start + (dp_rank + 1) * length


@dataclass(frozen=True)
class BucketPlan:
    """Buckets in the order in which a backward pass completes them, and behind them
    what is frozen.
    """

    buckets: tuple[Bucket, ...]
    frozen: tuple[Placed, ...] = ()

    @property
    def num_trainable(self) -> int:
        """Length of the flat gradients."""
        return self.buckets[-1].end if self.buckets else 0

    @property
    def num_elements(self) -> int:
        """Length of the flat parameters."""
        return self.frozen[-1].end if self.frozen else self.num_trainable

    @property
    def placed(self) -> Iterable[Placed]:
        """Every parameter's place, in buffer order."""
        return (
            *(placed for bucket in self.buckets for placed in bucket.placed),
            *self.frozen,
        )


def default_bucket_elements(dp: int, trainable: int) -> int:
    """Megatron's max(40e6, 1e6 x dp), large enough for bandwidth; but no more than an
    eighth of a small model, where one bucket would leave nothing to overlap with, nor
    less than 1e6 x dp, below which a ring is bound by latency.
    """
    return min(max(40_000_000, 1_000_000 * dp), max(trainable // 8, 1_000_000 * dp))


def plan_buckets(
    parameters: Iterable[LocalParameter], dp: int, bucket_elements: int | None = None
) -> BucketPlan:
    """Reverse table order (a backward pass goes from the head to the embedding); a
    bucket closes once it is full enough.

    What two pipeline stages hold is alone in its bucket: its shards are then the same
    rows on both.
    """
    table = list(parameters)
    trainable = [parameter for parameter in reversed(table) if parameter.trainable]
    limit = bucket_elements or default_bucket_elements(
        dp, sum(prod(parameter.shape) for parameter in trainable)
    )
    buckets: list[Bucket] = []
    placed: list[Placed] = []
    bucket_start = cursor = 0

    def close() -> None:
        nonlocal bucket_start, cursor, placed
        if placed:
            cursor = bucket_start + _round_up(cursor - bucket_start, ALIGNMENT * dp)
            buckets.append(Bucket(len(buckets), bucket_start, cursor, tuple(placed)))
            bucket_start = cursor
            placed = []

    for parameter in trainable:
        if parameter.is_shared_embedding:
            close()
        placed.append(Placed(parameter, cursor))
        cursor = _round_up(placed[-1].end, ALIGNMENT)
        if cursor - bucket_start >= limit or parameter.is_shared_embedding:
            close()
    close()
    frozen: list[Placed] = []
    for parameter in table:
        if not parameter.trainable:
            frozen.append(Placed(parameter, cursor))
            cursor = _round_up(frozen[-1].end, ALIGNMENT)
    return BucketPlan(tuple(buckets), tuple(frozen))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
