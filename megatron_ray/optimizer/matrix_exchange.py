"""Puts matrices together that are spread over ranks, and returns what becomes of them.

Under ZeRO the replicas have ranges of a matrix, and each tensor-parallel rank has its
part. One rank of all of them applies the function to the whole. Owns: the two exchanges.
Must not know: the function, weights, state.
"""

from collections.abc import Callable, Sequence

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
    results = _over_tp(function, [owned.matrix for owned in mine], wholes, tp_group)
    return _scatter(matrices, mine, results, values, replica_group)


def _gather(
    matrices: Sequence[OwnedMatrix],
    mine: Sequence[OwnedMatrix],
    values: Sequence[Tensor],
    group: Group,
) -> list[Tensor]:
    """Sends ranges to the owners of their matrices; returns this replica's own matrices."""
    outgoing = _lists(group)
    for owned, value in zip(matrices, values, strict=True):
        outgoing[owned.owner].append(value)
    incoming: list[list[int]] = [[] for _ in outgoing]
    for owned in mine:
        for share in owned.shares():
            incoming[share.replica].append(share.num_elements)
    arrived = [iter(ranges) for ranges in _exchange(outgoing, incoming, values[0], group)]
    wholes = []
    for owned in mine:
        ranges = [next(arrived[share.replica]) for share in owned.shares()]
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
    outgoing = _lists(group)
    for owned, result in zip(mine, results, strict=True):
        flat = result.reshape(-1)
        for share in owned.shares():
            outgoing[share.replica].append(flat[share.start : share.end])
    incoming: list[list[int]] = [[] for _ in outgoing]
    for owned, value in zip(matrices, values, strict=True):
        incoming[owned.owner].append(value.numel())
    arrived = [iter(ranges) for ranges in _exchange(outgoing, incoming, values[0], group)]
    return [next(arrived[owned.owner]) for owned in matrices]


def _over_tp(
    function: OfMatrix, matrices: Sequence[Matrix], parts: Sequence[Tensor], group: Group
) -> list[Tensor]:
    """Applies a function to matrices whose parts the tp ranks have.

    Each is put together on one tp rank, so that each rank computes a share of them.
    """
    sharded = []
    for matrix in matrices:
        if matrix.is_sharded:
            sharded.append(matrix)
    # Every rank of a replicated matrix has all of it, and gets the same result.
    if group is None or not sharded:
        return [function(part) for part in parts]
    owners = tp_owners(sharded, collectives.size(group))
    own_parts = []
    for matrix, part in zip(matrices, parts, strict=True):
        if matrix.is_sharded:
            own_parts.append(part)
    moved = iter(_owned_by_tp(function, sharded, own_parts, owners, group))
    results = []
    for matrix, part in zip(matrices, parts, strict=True):
        if matrix.is_sharded:
            results.append(next(moved))
        else:
            results.append(function(part))
    return results


def _owned_by_tp(
    function: OfMatrix,
    matrices: Sequence[Matrix],
    parts: Sequence[Tensor],
    owners: Sequence[int],
    group: Group,
) -> list[Tensor]:
    mine = []
    outgoing = _lists(group)
    for matrix, part, owner in zip(matrices, parts, owners, strict=True):
        outgoing[owner].append(part)
        if owner == collectives.rank(group):
            mine.append(matrix)
    # All tp ranks have parts of one size.
    sizes = [matrix.num_elements for matrix in mine]
    received = _exchange(outgoing, [sizes] * len(outgoing), parts[0], group)
    returned = _lists(group)
    for index, matrix in enumerate(mine):
        shards = [tensors[index].view(matrix.shape) for tensors in received]
        result = function(_joined(matrix, shards))
        for shard, to_rank in zip(
            _shards(matrix, result, len(shards)), returned, strict=True
        ):
            to_rank.append(shard)
    expected: list[list[int]] = [[] for _ in outgoing]
    for matrix, owner in zip(matrices, owners, strict=True):
        expected[owner].append(matrix.num_elements)
    arrived = [iter(shards) for shards in _exchange(returned, expected, parts[0], group)]
    results = []
    for matrix, owner in zip(matrices, owners, strict=True):
        results.append(next(arrived[owner]).view(matrix.shape))
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


def _shards(matrix: Matrix, whole: Tensor, tp: int) -> list[Tensor]:
    """Returns the parts that the tp ranks have of a whole matrix."""
    weights = torch.split(whole, [part.logical.shape[0] for part in matrix.parts])
    shards = []
    for rank in range(tp):
        boxes = []
        for part, weight in zip(matrix.parts, weights, strict=True):
            dim = part.logical.shard_dim
            assert dim is not None
            size = part.box.size[dim]
            boxes.append(weight.narrow(dim, size * (rank // part.num_kv_replicas), size))
        shards.append(torch.cat(boxes))
    return shards


def _lists(group: Group) -> list[list[Tensor]]:
    """Returns an empty list for each rank."""
    return [[] for _ in range(collectives.size(group))]


def _exchange(
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[int]],
    like: Tensor,
    group: Group,
) -> list[list[Tensor]]:
    """Sends outgoing[r] to rank r, and returns flat tensors of incoming[r] elements of it.

    `like` is any tensor of their type.
    """
    pieces = list[Tensor]()
    for tensors in outgoing:
        pieces.extend(tensor.reshape(-1) for tensor in tensors)
    if group is None:
        return [pieces]
    send = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    receive = [sum(sizes) for sizes in incoming]
    flat = torch.cat([like.new_empty(0), *pieces])
    received = collectives.all_to_all_rows(flat, group, send, receive)
    by_rank = []
    for sizes, part in zip(incoming, torch.split(received, receive), strict=True):
        by_rank.append(list(torch.split(part, list(sizes))))
    return by_rank
