"""Wraps the collectives of torch.distributed with types.

Owns: names of collectives in torch's versions, and that each is in the process's record
(`recording`). Must not know: axes, layers, buckets.

The group is always an argument; `None` is a group of one rank, for which every
collective is the identity. The handle of `start_...` must be waited for before the
result is read; until then its tensors must not change.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ray.distributed.recording import enter, enter_message

Group = dist.ProcessGroup | None
_set_timeout = dist.distributed_c10d._set_pg_timeout

# torch 2.13 renamed the flat collectives.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending(Protocol):
    """A running collective."""

    def wait(self) -> object:
        """Blocks the host (CPU) or the stream (CUDA) until the result may be used."""

    def is_completed(self) -> bool:
        """Returns whether `wait` would return at once."""
        ...


class _Done:
    """The handle of a completed transfer."""

    def wait(self) -> object:
        return None

    def is_completed(self) -> bool:
        return True


DONE: Pending = _Done()


class _JointPending:
    """The joint handle of several transfers."""

    def __init__(self, works: Sequence[Pending]) -> None:
        self._works = works

    def wait(self) -> object:
        for work in self._works:
            work.wait()
        self._works = ()  # a second wait would make gloo wait for another message
        return None

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


class _PendingWithFinish:
    """Transfers and a computation on their results, which `wait` runs once."""

    def __init__(self, transfers: Pending, finish: Callable[[], object]) -> None:
        self._transfers = transfers
        self._finish = finish
        self._is_done = False

    def wait(self) -> object:
        if not self._is_done:
            self._transfers.wait()
            self._finish()
            self._is_done = True
        return None

    def is_completed(self) -> bool:
        return self._is_done


def size(group: Group) -> int:
    """Returns the number of ranks in the group."""
    return 1 if group is None else group.size()


def rank(group: Group) -> int:
    """Returns this process's index in the group."""
    return 0 if group is None else group.rank()


# ---- on CPU, collectives made of messages
#
# gloo passes a collective between threads, which takes longer than the transfer on few
# cores, and its reduce-scatter is an all-reduce of a copy. Point-to-point messages avoid
# both, so some collectives on CPU are built from them (measured with two ranks on two
# cores: a tensor-parallel step 15 % faster, a reduce-scatter in half the time). The tag
# separates them from a pipeline's messages.
_TAG = 1


def _start_messages(
    outgoing: Sequence[Tensor], incoming: Sequence[Tensor], group: dist.ProcessGroup
) -> Pending:
    """Starts sending outgoing[r] to rank r and receiving incoming[r] from it.

    All are contiguous; this rank's own entries are ignored.
    """
    works = []
    peers = []
    for peer in range(group.size()):
        # gloo would hang on an empty message.
        if peer != group.rank() and incoming[peer].numel() > 0:
            peers.append(peer)
    for peer in peers:
        works.append(dist.isend(outgoing[peer], group=group, group_dst=peer, tag=_TAG))
    for peer in peers:
        works.append(dist.irecv(incoming[peer], group=group, group_src=peer, tag=_TAG))
    return _JointPending(works)  # type: ignore[arg-type]


def _start_pair_reduction(
    tensor: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType
) -> Pending:
    """Starts an all-reduce of two ranks.

    Each sends its tensor and reduces: the sum of two is bitwise commutative.
    """
    peers_tensor = torch.empty_like(tensor)

    def reduce() -> None:
        if op == dist.ReduceOp.SUM:
            tensor.add_(peers_tensor)
        else:
            torch.maximum(tensor, peers_tensor, out=tensor)

    return _PendingWithFinish(
        _start_messages([tensor] * 2, [peers_tensor] * 2, group), reduce
    )


def _start_direct_reduce_scatter(
    shard: Tensor, tensor: Tensor, group: dist.ProcessGroup
) -> Pending:
    """Starts a reduce-scatter in which every rank sends all other ranks their parts.

    A rank adds the received parts to its own in the order of ranks, so that sums are
    reproducible.
    """
    parts = tensor.view(group.size(), *shard.shape)
    own_rank = group.rank()
    received = torch.empty(
        (group.size() - 1, *shard.shape), dtype=shard.dtype, device=shard.device
    )

    def add_up() -> None:
        # The shard may alias this rank's part of the tensor.
        if shard.data_ptr() != parts[own_rank].data_ptr():
            shard.copy_(parts[own_rank])
        for part in received:
            shard.add_(part)

    # Indexed by sender; the entry of this rank itself is unused.
    incoming = [*received[:own_rank], shard, *received[own_rank:]]
    return _PendingWithFinish(_start_messages(list(parts), incoming, group), add_up)


# ---- reductions


def all_reduce(
    tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduces in place and returns the same tensor."""
    start_all_reduce(tensor, group, op).wait()
    return tensor


def start_all_reduce(
    tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Pending:
    """Starts a sum (or maximum) of a contiguous tensor, in place."""
    if group is None:
        return DONE
    entry = enter("all_reduce", group)
    if tensor.device.type == "cpu" and group.size() == 2:
        entry.work = _start_pair_reduction(tensor, group, op)
    else:
        entry.work = dist.all_reduce(tensor, op=op, group=group, async_op=True)
    return entry


def reduce_scatter_rows(tensor: Tensor, group: Group) -> Tensor:
    """Sums over the group and returns this rank's rows of dim 0."""
    scattered, pending = start_reduce_scatter_rows(tensor, group)
    pending.wait()
    return scattered


def start_reduce_scatter_rows(tensor: Tensor, group: Group) -> tuple[Tensor, Pending]:
    """Starts a sum over the group; the first item receives this rank's rows of dim 0."""
    if group is None:
        return tensor, DONE
    scattered = tensor.new_empty((tensor.shape[0] // group.size(), *tensor.shape[1:]))
    return scattered, start_reduce_scatter_into(scattered, tensor.contiguous(), group)


def start_reduce_scatter_into(shard: Tensor, tensor: Tensor, group: Group) -> Pending:
    """Starts a sum of `tensor`; `shard` receives this rank's equal part of dim 0.

    `shard` may alias that part of `tensor`.
    """
    if group is None:
        return DONE
    entry = enter("reduce_scatter", group)
    if tensor.device.type == "cpu":
        entry.work = _start_direct_reduce_scatter(shard, tensor, group)
    else:
        entry.work = _reduce_scatter(shard, tensor, group=group, async_op=True)
    return entry


def reduce_scatter_uneven_rows(tensor: Tensor, rows: Sequence[int], group: Group) -> Tensor:
    """Sums over the group; rank r receives its rows[r] rows of dim 0."""
    if group is None:
        return tensor
    max_rows = max(rows)
    if min(rows) == max_rows:
        return reduce_scatter_rows(tensor, group)
    padded = tensor.new_zeros((len(rows), max_rows, *tensor.shape[1:]))
    for index, part in enumerate(torch.split(tensor, list(rows))):
        padded[index, : rows[index]] = part
    return reduce_scatter_rows(padded.flatten(0, 1), group)[: rows[group.rank()]]


# ---- gathers


def all_gather_rows(tensor: Tensor, group: Group) -> Tensor:
    """Concatenates along dim 0 in group order."""
    gathered, pending = start_all_gather_rows(tensor, group)
    pending.wait()
    return gathered


def start_all_gather_rows(tensor: Tensor, group: Group) -> tuple[Tensor, Pending]:
    """Starts a concatenation along dim 0; the first item receives it."""
    if group is None:
        return tensor, DONE
    gathered = tensor.new_empty((tensor.shape[0] * group.size(), *tensor.shape[1:]))
    return gathered, start_all_gather_into(gathered, tensor.contiguous(), group)


def start_all_gather_into(output: Tensor, shard: Tensor, group: Group) -> Pending:
    """Starts filling flat `output` with every rank's shard.

    `shard` may alias this rank's part of `output`.
    """
    if group is None:
        return DONE
    entry = enter("all_gather", group)
    if shard.device.type == "cpu":
        parts = output.view(group.size(), *shard.shape)
        if parts[group.rank()].data_ptr() != shard.data_ptr():
            parts[group.rank()].copy_(shard)
        entry.work = _start_messages([shard] * group.size(), list(parts), group)
    else:
        entry.work = _all_gather(output, shard, group=group, async_op=True)
    return entry


def all_gather_uneven_rows(tensor: Tensor, rows: Sequence[int], group: Group) -> Tensor:
    """Concatenates along dim 0 in group order; rank r has rows[r] rows.

    All ranks are padded to the largest, because gloo supports equal sizes only, and
    NCCL would broadcast one rank after another.
    """
    if group is None:
        return tensor
    max_rows = max(rows)
    if min(rows) == max_rows:
        return all_gather_rows(tensor, group)
    padded = tensor.new_zeros((max_rows, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = []
    for index, part in enumerate(torch.split(all_gather_rows(padded, group), max_rows)):
        parts.append(part[: rows[index]])
    return torch.cat(parts)


def local_rows(tensor: Tensor, group: Group) -> Tensor:
    """Returns this rank's equal part of dim 0, as a view."""
    if group is None:
        return tensor
    num_rows = tensor.shape[0] // group.size()
    return tensor.narrow(0, num_rows * group.rank(), num_rows)


# ---- messages


def start_send(tensor: Tensor, to: int, group: Group) -> Pending:
    """Starts sending to a rank of the group.

    Sends and receives between two ranks match in the order of their start, over both
    directions (NCCL).
    """
    if group is None:
        raise ValueError("a group of one rank has no receiver")
    entry = enter_message("send", group, to, is_send=True)
    entry.work = dist.isend(tensor, group=group, group_dst=to)
    return entry


def start_receive(tensor: Tensor, sender: int, group: Group) -> Pending:
    """Starts receiving from a rank of the group into `tensor`."""
    if group is None:
        raise ValueError("a group of one rank has no sender")
    entry = enter_message("receive", group, sender, is_send=False)
    entry.work = dist.irecv(tensor, group=group, group_src=sender)
    return entry


def start_exchange(
    outgoing: Tensor, to: int, incoming: Tensor, sender: int, group: Group
) -> Pending:
    """Starts a send and a receive that belong together.

    It cannot deadlock, unlike a send that waits for the peer's receive.
    """
    if group is None:
        incoming.copy_(outgoing)
        return DONE
    # All ranks of a ring exchange, so it counts as a collective.
    entry = enter("exchange", group)
    if outgoing.device.type != "cuda":
        # gloo buffers sends, so two separate operations cannot deadlock.
        sent = dist.isend(outgoing, group=group, group_dst=to)
        received = dist.irecv(incoming, group=group, group_src=sender)
        entry.work = _JointPending([sent, received])  # type: ignore[list-item]
        return entry
    # Without a batch, two sends that wait for each other would deadlock in NCCL.
    sending = dist.P2POp(dist.isend, outgoing, group=group, group_peer=to)
    receiving = dist.P2POp(dist.irecv, incoming, group=group, group_peer=sender)
    entry.work = _JointPending(dist.batch_isend_irecv([sending, receiving]))
    return entry


def all_to_all_rows(
    tensor: Tensor,
    group: Group,
    send: Sequence[int] | None = None,
    receive: Sequence[int] | None = None,
) -> Tensor:
    """Sends send[r] rows of dim 0 to rank r and returns receive[r] rows of it, in rank order.

    Without these numbers all parts are equal.
    """
    received, pending = start_all_to_all_rows(tensor, group, send, receive)
    pending.wait()
    return received


def start_all_to_all_rows(
    tensor: Tensor,
    group: Group,
    send: Sequence[int] | None = None,
    receive: Sequence[int] | None = None,
) -> tuple[Tensor, Pending]:
    """Starts `all_to_all_rows`; returns its result and the handle."""
    if group is None:
        return tensor, DONE
    num_rows = tensor.shape[0]
    if receive is not None:
        num_rows = sum(receive)
    received = torch.empty(
        (num_rows, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device
    )
    entry = enter("all_to_all", group)
    # torch takes lists, or None for equal parts.
    entry.work = dist.all_to_all_single(
        received,
        tensor.contiguous(),
        None if receive is None else list(receive),
        None if send is None else list(send),
        group=group,
        async_op=True,
    )
    return received, entry


def set_timeout(group: Group, timeout: timedelta) -> None:
    """Changes the time after which a collective of the group fails, from the next one on.

    gloo's point-to-point messages keep the time with which the group was made.
    """
    if group is not None:
        _set_timeout(timeout, group)


def barrier(group: Group, device: torch.device) -> None:
    """Waits for all ranks of the group.

    It is an all-reduce of one number, which tests the group and opens its connections.
    """
    all_reduce(torch.ones(1, device=device), group)
