"""Puts matrices together that are spread over ranks, and returns what becomes of them.

Under ZeRO the replicas have ranges of a matrix, and each tensor-parallel rank has its
part. One rank of all of them applies the function to the whole. Owns: the two exchanges.
Must not know: the function, weights, state.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.sharding.matrices import Matrix, OwnedMatrix, tp_owners

OfMatrix = Callable[[Tensor], Tensor]
"""Returns a matrix of the same shape."""


def apply_to_whole(
    function: OfMatrix,
    matrices: Sequence[OwnedMatrix],
    values: Sequence[Tensor],
    replica_group: Group,
    tp_group: Group,
) -> list[Tensor]:
    """Applies a function to whole matrices and returns this rank's ranges of the results.

    `values` are this replica's flat ranges of `matrices`, which are the same on all ranks
    of both groups; empty where it has none.
    """
    replica = collectives.rank(replica_group)
    mine = [owned for owned in matrices if owned.owner == replica]
    wholes = _gather(matrices, mine, values, replica_group)
    results = _over_tp(function, mine, wholes, tp_group)
    return _scatter(matrices, mine, results, values, replica_group)


class _Exchange:
    """Sends flat tensors between all ranks of a group, any number between any two.

    Both sides name the tensors between two ranks in the same order.
    """

    def __init__(self, group: Group, like: Tensor) -> None:
        """`like` is any tensor of their type."""
        self._group = group
        self._outgoing: dict[int, list[Tensor]] = {}
        self._sizes: dict[int, list[int]] = {}
        for rank in range(collectives.size(group)):
            self._outgoing[rank] = [like.new_empty(0)]
            self._sizes[rank] = [0]
        self._arrived: dict[int, Iterator[Tensor]] = {}

    def send(self, rank: int, tensor: Tensor) -> None:
        """Adds a tensor for a rank."""
        self._outgoing[rank].append(tensor.reshape(-1))

    def expect(self, rank: int, num_elements: int) -> None:
        """Adds a tensor that a rank sends to this one."""
        self._sizes[rank].append(num_elements)

    def run(self) -> None:
        """Sends and receives everything."""
        if self._group is None:
            self._arrived[0] = iter(self._outgoing[0][1:])
            return
        pieces = list[Tensor]()
        send = []
        receive = []
        for rank, tensors in self._outgoing.items():
            pieces += tensors
            send.append(sum(map(torch.numel, tensors)))
            receive.append(sum(self._sizes[rank]))
        flat = torch.cat(pieces)
        received = collectives.all_to_all_rows(flat, self._group, send, receive)
        for rank, part in enumerate(torch.split(received, receive)):
            self._arrived[rank] = iter(torch.split(part, self._sizes[rank])[1:])

    def next_of(self, rank: int) -> Tensor:
        """Returns the next tensor of a rank."""
        return next(self._arrived[rank])


def _gather(
    matrices: Sequence[OwnedMatrix],
    mine: Sequence[OwnedMatrix],
    values: Sequence[Tensor],
    group: Group,
) -> list[Tensor]:
    """Sends ranges to the owners of their matrices; returns this replica's own matrices."""
    exchange = _Exchange(group, values[0])
    for owned, value in zip(matrices, values, strict=True):
        exchange.send(owned.owner, value)
    for owned in mine:
        for share in owned.shares():
            exchange.expect(share.replica, share.num_elements)
    # Empty ranges are sent but not expected, since they add nothing.
    exchange.run()
    wholes = []
    for owned in mine:
        ranges = [exchange.next_of(share.replica) for share in owned.shares()]
        wholes.append(torch.cat(ranges).view(owned.matrix.shape))
    return wholes


def _scatter(
    matrices: Sequence[OwnedMatrix],
    mine: Sequence[OwnedMatrix],
    results: Sequence[Tensor],
    values: Sequence[Tensor],
    group: Group,
) -> list[Tensor]:
    """Returns the ranges of `values` to the replicas they are of, now of the results."""
    exchange = _Exchange(group, values[0])
    for owned, result in zip(mine, results, strict=True):
        flat = result.reshape(-1)
        for share in owned.shares():
            exchange.send(share.replica, flat[share.start : share.end])
    for owned, value in zip(matrices, values, strict=True):
        exchange.expect(owned.owner, value.numel())
    exchange.run()
    return [exchange.next_of(owned.owner) for owned in matrices]


def _over_tp(
    function: OfMatrix,
    matrices: Sequence[OwnedMatrix],
    parts: Sequence[Tensor],
    group: Group,
) -> list[Tensor]:
    """Applies a function to matrices whose parts the tp ranks have.

    Each is put together on one tp rank, so that each rank computes a share of them.
    """
    results = list(parts)
    sharded = []
    places = []
    for place, owned in enumerate(matrices):
        if group is not None and owned.matrix.is_sharded:
            sharded.append(owned.matrix)
            places.append(place)
        else:
            # Every tp rank has all of it, and gets the same result.
            results[place] = function(parts[place])
    if sharded:
        sharded_parts = [parts[place] for place in places]
        moved = _owned_by_tp(function, sharded, sharded_parts, group)
        for place, result in zip(places, moved, strict=True):
            results[place] = result
    return results


def _owned_by_tp(
    function: OfMatrix, matrices: Sequence[Matrix], parts: Sequence[Tensor], group: Group
) -> list[Tensor]:
    tp = collectives.size(group)
    owners = tp_owners(matrices, tp)
    exchange = _Exchange(group, parts[0])
    returned = _Exchange(group, parts[0])
    mine = []
    for matrix, part, owner in zip(matrices, parts, owners, strict=True):
        exchange.send(owner, part)
        # All tp ranks have parts of one size.
        returned.expect(owner, matrix.num_elements)
        if owner == collectives.rank(group):
            mine.append(matrix)
    for matrix in mine:
        for rank in range(tp):
            exchange.expect(rank, matrix.num_elements)
    exchange.run()
    for matrix in mine:
        shards = []
        for rank in range(tp):
            shards.append(exchange.next_of(rank).view(matrix.shape))
        result = function(_joined(matrix, shards))
        for rank in range(tp):
            returned.send(rank, _shard(matrix, result, rank))
    returned.run()
    results = []
    for matrix, owner in zip(matrices, owners, strict=True):
        results.append(returned.next_of(owner).view(matrix.shape))
    return results


def _joined(matrix: Matrix, shards: Sequence[Tensor]) -> Tensor:
    """Returns the whole matrix of the tp ranks' parts, each logical weight in order."""
    weights = []
    row = 0
    for part in matrix.parts:
        rows = part.box.size[0]
        dim = part.logical.shard_dim
        assert dim is not None
        # Of ranks with replicas of one key/value head the first.
        boxes = [shard[row : row + rows] for shard in shards[:: part.num_kv_replicas]]
        weights.append(torch.cat(boxes, dim=dim))
        row += rows
    return torch.cat(weights)


def _shard(matrix: Matrix, whole: Tensor, rank: int) -> Tensor:
    """Returns the part that a tp rank has of a whole matrix."""
    boxes = []
    row = 0
    for part in matrix.parts:
        rows = part.logical.shape[0]
        dim = part.logical.shard_dim
        assert dim is not None
        size = part.box.size[dim]
        weight = whole[row : row + rows]
        boxes.append(weight.narrow(dim, size * (rank // part.num_kv_replicas), size))
        row += rows
    return torch.cat(boxes)
