"""Finds the matrices in a rank's tensors, and the replica that puts each together.

A matrix is one logical weight, or several fused ones that count as one. Under ZeRO each
replica has a range of it; its owner gathers them for an update and returns the result.
Pure Python. Must not know: torch, process groups, how a matrix is updated.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from megatron_ray.config.optimizer import MuonConfig
from megatron_ray.sharding.buckets import BucketPlan
from megatron_ray.sharding.parameter_types import LocalParameter, Part
from megatron_ray.sharding.row_shards import row_range

ROUND_ELEMENTS = 1 << 24
"""Elements that a replica updates at once, which bounds its temporaries; those of two
matrices where a matrix is large."""

_QKV = frozenset(("q", "k", "v"))
_GATE_UP = frozenset(("gate", "up"))


@dataclass(frozen=True)
class Matrix:
    """One matrix in a rank's tensor: consecutive rows, of one or several parts."""

    tensor: LocalParameter
    parts: tuple[Part, ...]

    @cached_property
    def start(self) -> int:
        """Its first element in the tensor."""
        return self.parts[0].start * self.parts[0].box.size[1]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Shape on this rank."""
        last = self.parts[-1]
        rows = last.start + last.box.size[0] - self.parts[0].start
        return rows, last.box.size[1]

    @cached_property
    def full_shape(self) -> tuple[int, int]:
        """Shape of the whole matrix, over all tp ranks."""
        rows = 0
        for part in self.parts:
            rows += part.logical.shape[0]
        return rows, self.parts[0].logical.shape[1]

    @cached_property
    def num_elements(self) -> int:
        """Elements on this rank."""
        return prod(self.shape)

    @property
    def is_sharded(self) -> bool:
        """Whether tp ranks may have different parts of it."""
        return self.tensor.tp_sharded

    def flops(self, steps: int) -> int:
        """Returns the FLOPs of this many Newton-Schulz iterations of the whole matrix.

        An iteration has two products of the smaller side's square with the matrix, and one
        of that square with itself.
        """
        small, large = sorted(self.full_shape)
        return steps * (4 * small * small * large + 2 * small**3)


@dataclass(frozen=True)
class Share:
    """A replica's range of a matrix, in elements from the matrix's first."""

    replica: int
    start: int
    end: int

    @property
    def num_elements(self) -> int:
        """Elements of the range."""
        return self.end - self.start


@dataclass(frozen=True)
class SharedMatrix:
    """A matrix in a sequence of elements of which each replica has an equal part."""

    matrix: Matrix
    offset: int
    """Its first element in the sequence."""
    length: int
    """Elements of each replica."""

    @property
    def first_replica(self) -> int:
        """The first replica that has elements of it."""
        return self.offset // self.length

    @property
    def last_replica(self) -> int:
        """The last replica that has elements of it."""
        return (self.offset + self.matrix.num_elements - 1) // self.length

    def share_of(self, replica: int) -> Share | None:
        """Returns a replica's range; None if it has no element."""
        # Computed, since thousands of replicas may share each of thousands of matrices.
        start = max(0, replica * self.length - self.offset)
        end = min(self.matrix.num_elements, (replica + 1) * self.length - self.offset)
        if start >= end:
            return None
        return Share(replica, start, end)

    def shares(self) -> Iterator[Share]:
        """Yields the ranges of all replicas, which are the matrix, in order."""
        for replica in range(self.first_replica, self.last_replica + 1):
            share = self.share_of(replica)
            assert share is not None
            yield share


@dataclass(frozen=True)
class OwnedMatrix(SharedMatrix):
    """A matrix and the replica that updates it."""

    owner: int


Round = tuple[OwnedMatrix, ...]
"""Matrices that are updated at once."""


def matrices_of(tensor: LocalParameter, muon: MuonConfig) -> tuple[Matrix, ...]:
    """Returns the matrices in a tensor; none if it is frozen or no linear layer's."""
    matrices: list[Matrix] = []
    if not tensor.trainable:
        return ()
    for part in tensor.parts:
        if not part.logical.is_matrix:
            continue
        if matrices and _are_one(matrices[-1].parts[-1], part, muon):
            matrices[-1] = Matrix(tensor, (*matrices[-1].parts, part))
        else:
            matrices.append(Matrix(tensor, (part,)))
    return tuple(matrices)


def _are_one(first: Part, second: Part, muon: MuonConfig) -> bool:
    """Returns whether two fused weights belong to one matrix."""
    layer, _, name = first.logical.name.removesuffix(".weight").rpartition(".")
    other_layer, _, other_name = second.logical.name.removesuffix(".weight").rpartition(".")
    names = {name, other_name}
    if layer != other_layer:
        # Experts, fused one after another.
        return False
    if names <= _QKV:
        return not muon.split_qkv
    return names <= _GATE_UP and not muon.split_gate_up


def rounds_of_buckets(
    plan: BucketPlan, muon: MuonConfig, replicas: int
) -> tuple[Round, ...]:
    """Returns all matrices of flat buffers, with their owners.

    `replicas`: the number of ranks that each update an equal part of every bucket (ZeRO-1),
    or 1.
    """
    return _rounds(_flat_matrices(plan, muon, replicas), replicas)


def _flat_matrices(
    plan: BucketPlan, muon: MuonConfig, replicas: int
) -> Iterator[SharedMatrix]:
    for bucket in plan.buckets:
        length = (bucket.end - bucket.start) // replicas
        shared = []
        for placed in bucket.placed:
            for matrix in matrices_of(placed.parameter, muon):
                offset = placed.start + matrix.start - bucket.start
                shared.append(SharedMatrix(matrix, offset, length))
        # Those of all replicas in turn, so that each has some in a round.
        shared.sort(key=lambda entry: entry.offset % entry.length)
        yield from shared


def rounds_of_rows(
    table: Iterable[LocalParameter], muon: MuonConfig, replicas: int
) -> tuple[Round, ...]:
    """Returns all matrices of tensors whose rows are sharded over replicas (ZeRO-3)."""
    return _rounds(_row_matrices(table, muon, replicas), replicas)


def _row_matrices(
    table: Iterable[LocalParameter], muon: MuonConfig, replicas: int
) -> Iterator[SharedMatrix]:
    for tensor in table:
        for matrix in matrices_of(tensor, muon):
            # The first replica has as many rows as any.
            _, rows = row_range(tensor.shape[0], 0, replicas)
            yield SharedMatrix(matrix, matrix.start, rows * matrix.shape[1])


def _rounds(matrices: Iterable[SharedMatrix], replicas: int) -> tuple[Round, ...]:
    """Cuts a sequence of matrices into rounds, in which every replica has some."""
    matrices = list(matrices)
    largest = 0
    for shared in matrices:
        largest = max(largest, prod(shared.matrix.full_shape))
    # With fewer matrices most ranks would wait for those with the large ones; whole ones
    # count, since each tp rank updates some.
    most = replicas * max(ROUND_ELEMENTS, 2 * largest)
    rounds: list[Round] = []
    current: list[SharedMatrix] = []
    num_elements = 0
    for shared in matrices:
        current.append(shared)
        num_elements += shared.matrix.num_elements
        if num_elements >= most:
            rounds.append(_with_owners(current, replicas))
            current = []
            num_elements = 0
    if current:
        rounds.append(_with_owners(current, replicas))
    return tuple(rounds)


def _with_owners(matrices: Sequence[SharedMatrix], replicas: int) -> Round:
    """Returns matrices with owners: the only replica with elements, or the least busy."""
    owners = []
    work = []
    costs = [0] * replicas
    spread = []
    for index, shared in enumerate(matrices):
        owners.append(shared.first_replica)
        work.append(shared.matrix.flops(1))
        if shared.first_replica == shared.last_replica:
            costs[owners[index]] += work[index]
        else:
            spread.append(index)
    # The largest first, so that small ones fill up what is uneven.
    spread.sort(key=lambda index: -work[index])
    for index in spread:
        owners[index] = least_busy(costs, work[index])
    round_ = []
    for shared, owner in zip(matrices, owners, strict=True):
        round_.append(OwnedMatrix(shared.matrix, shared.offset, shared.length, owner))
    return tuple(round_)


def tp_owners(matrices: Sequence[Matrix], tp: int) -> list[int]:
    """Returns the tp rank that updates each of some sharded matrices."""
    costs = [0] * tp
    return [least_busy(costs, matrix.flops(1)) for matrix in matrices]


def least_busy(costs: list[int], cost: int) -> int:
    """Adds a cost to the smallest of `costs`, and returns the index of that."""
    index = costs.index(min(costs))
    costs[index] += cost
    return index
