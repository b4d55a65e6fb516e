"""Names the nearest layout that the nodes could hold, for a job that they cannot.

Owns: which layouts are tried, and the words of a refusal. Pure. Must not know: Ray, memory
and time of a layout.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_ray.validation import check, resolution
from workers.decisions.topology.room import (
    Demand,
    FreeNode,
    max_islands,
    resources_of,
    shape_of,
)
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo

_MAX_TRIES = 24
"""Layouts that are checked; each check takes milliseconds."""
_UNITS = {"GPU": "GPUs", "CPU": "CPUs"}


@dataclass(frozen=True)
class _Layout:
    """Degrees that would fit onto the nodes."""

    tp: int
    pp: int
    dp: int
    ranks: int
    changes: int
    """Degrees other than dp that differ from the spec's."""


def accept_any(_: JobSpec) -> bool:
    """Returns true for every spec."""
    return True


def nearest_layout(
    spec: JobSpec,
    nodes: Sequence[NodeInfo],
    demand: Demand,
    is_allowed: Callable[[JobSpec], bool] = accept_any,
) -> str | None:
    """Returns the degrees to change so that the job fits, such as `tp=4, dp=4`.

    As many ranks as possible are kept, then as many degrees, then large ones. `is_allowed`
    refuses layouts for other reasons, such as memory. None when none is found.
    """
    layouts = sorted(_layouts(spec, nodes, demand), key=_preference)
    for layout in layouts[:_MAX_TRIES]:
        candidate = _with_layout(spec, layout)
        if not check.find_problems(candidate, layout.ranks) and is_allowed(candidate):
            return _difference(spec, layout)
    return None


def missing_room(nodes: Iterable[NodeInfo], demand: Demand) -> str:
    """Returns why no node can hold an island, such as `needs 8 GPUs on one node, ...`."""
    usable = list(map(resources_of, demand.rules.allowed(nodes)))
    amounts = []
    for name, amount in sorted(demand.per_rank.items(), reverse=True):
        needed = f"{amount * demand.island:g} {_UNITS.get(name, name)}"
        amounts.append(needed)
        largest = max((resources.get(name, 0.0) for resources in usable), default=0.0)
        if largest < amount * demand.island:
            return f"needs {needed} on one node, the largest has {largest:g}"
    return f"needs {' + '.join(amounts)} on one node, and none has them together"


def _layouts(spec: JobSpec, nodes: Sequence[NodeInfo], demand: Demand) -> Iterator[_Layout]:
    parallel = spec.parallel
    dp = parallel.dp
    if dp == "auto":
        dp = resolution.least_dp(spec)
    asked = parallel.tp * parallel.pp * parallel.cp * dp
    for tp in _divisors(parallel.tp):
        smaller = Demand(demand.per_rank, tp, demand.rules)
        room = (
            max_islands(FreeNode.all_empty(nodes), smaller, shape_of(nodes, smaller)) * tp
        )
        # A pipeline that is longer by what tp loses keeps the weights of a rank.
        for pp in {parallel.pp * parallel.tp // tp, *_divisors(parallel.pp)}:
            replica = tp * pp * parallel.cp
            largest = _largest_dp(spec, min(room, asked) // replica)
            if largest:
                changes = (tp != parallel.tp) + (pp != parallel.pp)
                yield _Layout(tp, pp, largest, replica * largest, changes)


def _largest_dp(spec: JobSpec, most: int) -> int:
    """Returns the largest dp, at most `most`, that divides the batch; 0 if none does."""
    samples = spec.training.batch_sizes.divisor // spec.training.micro_batch_size
    for dp in range(min(most, samples), 0, -1):
        if samples % dp == 0:
            return dp
    return 0


def _preference(layout: _Layout) -> tuple[int, ...]:
    return -layout.ranks, layout.changes, -layout.tp, -layout.pp


def _with_layout(spec: JobSpec, layout: _Layout) -> JobSpec:
    fields: dict[str, object] = {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp}
    # Without tensor parallelism there is no sequence to split over it.
    if layout.tp == 1:
        fields["sequence_parallel"] = False
    parallel = spec.parallel.model_copy(update=fields)
    return spec.model_copy(update={"parallel": parallel})


def _difference(spec: JobSpec, layout: _Layout) -> str:
    words = []
    for axis in ("tp", "pp", "dp"):
        given = getattr(spec.parallel, axis)
        size = getattr(layout, axis)
        if given not in (size, "auto"):
            words.append(f"{axis}={size}")
    return ", ".join(words)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
