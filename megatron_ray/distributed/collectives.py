"""Typed wrappers over torch.distributed.

Owns: which torch version names a collective how. The group is always an argument;
`None` is a group of one rank, for which everything is the identity. Must not know:
axes, layers, buckets.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

# torch 2.13 renamed the flat collectives; both names mean the same operation.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> object: ...

    def is_completed(self) -> bool: ...


class _Done:
    def wait(self) -> object:
        return None

    def is_completed(self) -> bool:
        return True


class _All:
    def __init__(self, works: Sequence[Pending]) -> None:
        self._works = works

    def wait(self) -> object:
        for work in self._works:
            work.wait()
        self._works = ()  # gloo would wait for another message
        return None

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


# gloo hands a collective from thread to thread, which takes longer than the transfer
# where cores are few, and its reduce-scatter is an all-reduce of a copy. Its messages
# are neither, so on CPU some collectives are made of them (measured with two ranks on
# two cores: a tensor-parallel step 15 % faster, a reduce-scatter in half the time). The
# tag keeps them apart from a pipeline's messages.
_TAG = 1


def _start_messages(
    outgoing: Sequence[Tensor], incoming: Sequence[Tensor], group: dist.ProcessGroup
) -> Pending:
    """outgoing[r] to rank r and incoming[r] from it, all contiguous; this rank's own
    are left alone, and so are empty ones, for which gloo would wait for ever.
    """
    others = [
        rank
        for rank in range(group.size())
        if rank != group.rank() and incoming[rank].numel() > 0
    ]
    sent = [
        dist.isend(outgoing[rank], group=group, group_dst=rank, tag=_TAG) for rank in others
    ]
    received = [
        dist.irecv(incoming[rank], group=group, group_src=rank, tag=_TAG) for rank in others
    ]
    return _All([*sent, *received])  # type: ignore[list-item]


class _Then:
    """Transfers, and what is to be done once with what has come; that is done in
    `wait`.
    """

    def __init__(self, transfers: Pending, finish: Callable[[], object]) -> None:
        self._transfers = transfers
        self._finish = finish
        self._done = False

    def wait(self) -> object:
        if not self._done:
            self._transfers.wait()
            self._finish()
            self._done = True
        return None

    def is_completed(self) -> bool:
        return self._done


def _start_pair_reduction(
    tensor: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType
) -> Pending:
    """An all-reduce of two ranks: each sends all it has and adds, which gives both the
    same bits.
    """
    other = torch.empty_like(tensor)

    def add() -> None:
        tensor.add_(other) if op == dist.ReduceOp.SUM else torch.maximum(
            tensor, other, out=tensor
        )

    return _Then(_start_messages([tensor] * 2, [other] * 2, group), add)


def _start_direct_reduce_scatter(
    shard: Tensor, tensor: Tensor, group: dist.ProcessGroup
) -> Pending:
    """Every rank sends every other its part and adds up what it gets, beginning with
    its own and going on in the order of ranks.
    """
    parts = tensor.view(group.size(), *shard.shape)
    rank = group.rank()
    received = torch.empty(
        (group.size() - 1, *shard.shape), dtype=shard.dtype, device=shard.device
    )

    def add_up() -> None:
        if shard.data_ptr() != parts[rank].data_ptr():
            shard.copy_(parts[rank])
        for part in received:
            shard.add_(part)

    return _Then(
        _start_messages(list(parts), [*received[:rank], shard, *received[rank:]], group),
        add_up,
    )


DONE: Pending = _Done()


def size(group: Group) -> int:
    """Ranks in the group."""
    return 1 if group is None else group.size()


def rank(group: Group) -> int:
    """This process's index in the group."""
    return 0 if group is None else group.rank()


def all_reduce(
    tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduces in place and returns the same tensor."""
    start_all_reduce(tensor, group, op).wait()
    return tensor


def start_all_reduce(
    tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Pending:
    """Starts a sum (or maximum) in place; the tensor, contiguous, is the result after
    `wait` and must stay as it is until then.
    """
    if group is None:
        return DONE
    if tensor.device.type == "cpu" and group.size() == 2:
        return _start_pair_reduction(tensor, group, op)
    return dist.all_reduce(tensor, op=op, group=group, async_op=True)  # type: ignore[no-any-return]


def all_gather_rows(tensor: Tensor, group: Group) -> Tensor:
    """Concatenates along dim 0 in group order."""
    gathered, pending = start_all_gather_rows(tensor, group)
    pending.wait()
    return gathered


def start_all_gather_rows(tensor: Tensor, group: Group) -> tuple[Tensor, Pending]:
    """Starts a concatenation along dim 0; the first item is complete after `wait`."""
    if group is None:
        return tensor, DONE
    gathered = tensor.new_empty((tensor.shape[0] * group.size(), *tensor.shape[1:]))
    return gathered, start_all_gather_into(gathered, tensor.contiguous(), group)


def start_all_gather_into(output: Tensor, shard: Tensor, group: Group) -> Pending:
    """Fills flat `output` with every rank's shard; `shard` may be this rank's part of
    `output`.
    """
    if group is None:
        return DONE
    if shard.device.type == "cpu":
        parts = output.view(group.size(), *shard.shape)
        if parts[group.rank()].data_ptr() != shard.data_ptr():
            parts[group.rank()].copy_(shard)
        return _start_messages([shard] * group.size(), list(parts), group)
    return _all_gather(output, shard, group=group, async_op=True)  # type: ignore[no-any-return]


def reduce_scatter_rows(tensor: Tensor, group: Group) -> Tensor:
    """Sums over the group and keeps this rank's rows of dim 0."""
    scattered, pending = start_reduce_scatter_rows(tensor, group)
    pending.wait()
    return scattered


def start_reduce_scatter_rows(tensor: Tensor, group: Group) -> tuple[Tensor, Pending]:
    """Starts a sum over the group of which this rank keeps its rows of dim 0."""
    if group is None:
        return tensor, DONE
    scattered = tensor.new_empty((tensor.shape[0] // group.size(), *tensor.shape[1:]))
    return scattered, start_reduce_scatter_into(scattered, tensor.contiguous(), group)


def start_reduce_scatter_into(shard: Tensor, tensor: Tensor, group: Group) -> Pending:
    """Starts a sum of `tensor` of which `shard` receives this rank's equal part of dim
    0; it may be that very part of `tensor`, the rest of which must stay as it is until
    `wait`.
    """
    if group is None:
        return DONE
    if tensor.device.type == "cpu":
        return _start_direct_reduce_scatter(shard, tensor, group)
    return _reduce_scatter(shard, tensor, group=group, async_op=True)  # type: ignore[no-any-return]


def all_gather_uneven_rows(tensor: Tensor, rows: Sequence[int], group: Group) -> Tensor:
    """Concatenates along dim 0 in group order, rank r having rows[r] of them.

    All send as many as the largest has, because gloo knows nothing else; NCCL would
    broadcast one rank after another.
    """
    if group is None:
        return tensor
    most = max(rows)
    if min(rows) == most:
        return all_gather_rows(tensor, group)
    padded = tensor.new_zeros((most, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    return torch.cat(
        [
            part[:count]
            for part, count in zip(
                torch.split(all_gather_rows(padded, group), most), rows, strict=True
            )
        ]
    )


def reduce_scatter_uneven_rows(tensor: Tensor, rows: Sequence[int], group: Group) -> Tensor:
    """Sums over the group; rank r keeps its rows[r] rows of dim 0."""
    if group is None:
        return tensor
    most = max(rows)
    if min(rows) == most:
        return reduce_scatter_rows(tensor, group)
    padded = tensor.new_zeros((len(rows), most, *tensor.shape[1:]))
    for part, mine, count in zip(
        torch.split(tensor, list(rows)), padded, rows, strict=True
    ):
        mine[:count] = part
    return reduce_scatter_rows(padded.flatten(0, 1), group)[: rows[group.rank()]]


def start_send(tensor: Tensor, to: int, group: Group) -> Pending:
    """Starts sending to a rank of the group; the tensor must stay as it is until
    `wait`.

    Between two ranks sends and receives match in the order in which they are started,
    in both directions together (NCCL).
    """
    if group is None:
        raise ValueError("a group of one rank has nobody to send to")
    return dist.isend(tensor, group=group, group_dst=to)  # type: ignore[return-value]


def start_receive(tensor: Tensor, sender: int, group: Group) -> Pending:
    """Starts receiving from a rank of the group; the tensor is complete after `wait`."""
    if group is None:
        raise ValueError("a group of one rank has nobody to receive from")
    return dist.irecv(tensor, group=group, group_src=sender)  # type: ignore[return-value]


def start_exchange(
    outgoing: Tensor, to: int, incoming: Tensor, sender: int, group: Group
) -> Pending:
    """Starts a send and a receive that belong together, so that no order of ranks can
    block; both are done after `wait`.
    """
    if group is None:
        incoming.copy_(outgoing)
        return DONE
    if (
        outgoing.device.type != "cuda"
        # gloo buffers what it is given; NCCL would wait for the other side with both sends
        # first
    ):
        sent = dist.isend(outgoing, group=group, group_dst=to)
        return _All([sent, dist.irecv(incoming, group=group, group_src=sender)])  # type: ignore[list-item]
    sending = dist.P2POp(dist.isend, outgoing, group=group, group_peer=to)
    receiving = dist.P2POp(dist.irecv, incoming, group=group, group_peer=sender)
    return _All(dist.batch_isend_irecv([sending, receiving]))


def all_to_all_rows(
    tensor: Tensor,
    group: Group,
    send: Sequence[int] | None = None,
    receive: Sequence[int] | None = None,
) -> Tensor:
    """send[r] rows of dim 0 go to rank r, receive[r] rows come from it, in rank order;
    equal parts where the numbers are not given.
    """
    if group is None:
        return tensor
    rows = tensor.shape[0] if receive is None else sum(receive)
    received = torch.empty(
        (rows, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device
    )
    arriving, leaving = (
        None if given is None else list(given) for given in (receive, send)
    )
    dist.all_to_all_single(received, tensor.contiguous(), arriving, leaving, group=group)
    return received


def local_rows(tensor: Tensor, group: Group) -> Tensor:
    """This rank's equal part of dim 0 (a view)."""
    if group is None:
        return tensor
    rows = tensor.shape[0] // group.size()
    return tensor.narrow(0, rows * group.rank(), rows)


def barrier(group: Group, device: torch.device) -> None:
    """One all-reduce of one number: proves that the group works, and opens its
    connections.
    """
    all_reduce(torch.ones(1, device=device), group)
