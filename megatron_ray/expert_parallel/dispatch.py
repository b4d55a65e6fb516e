"""Which rows go where: from each token's experts to rows that lie expert by expert on
the ranks that hold them, and back.

Owns: the two dispatchers, `alltoall` and `allgather`. Experts lie in order over ep,
each cut over etp; every rank has tokens of its own (under tensor parallelism by
sequence parallelism), so that a dispatch is the same whatever the layout of the dense
layers. Must not know: what an expert computes, who chose.

An expert's number of rows depends on the data and the host must know it to size
messages and buffers: the one place in a step where it waits for the device. It does not
where every expert has room for equally many rows (`room`).

Shapes: T tokens of this rank, K experts of a token, E experts, L of them on this rank,
H hidden, R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.expert_parallel.rows import (
    exchange,
    gather,
    reorder,
    sum_and_scatter,
    take_tokens,
    weigh_and_sum,
)
from megatron_ray.ops.matmul import Counts


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts, and the way back."""

    rows_RH: Tensor
    counts: Counts
    """Rows of each of this rank's experts, in the order in which they lie."""
    combine: Callable[[Tensor, Tensor], Tensor]
    """(the experts' outputs [R, H], weights [T, K]) -> weighted sums [T, H]."""


@dataclass(frozen=True)
class Capacity:
    """What is known of the choice beforehand."""

    dropless: bool = True
    """No token was sent away from one of its experts."""
    rows: int | None = None
    """Rows that each rank gives every expert, filled up with zeros; as many as there
    are when None."""


def sort_slots(
    experts_TK: Tensor, num_experts: int, room: Capacity
) -> tuple[Tensor, Counts]:
    """(slots [R], rows of each expert): row r comes from slot slots[r] of the flattened
    choice.

    Rows lie expert by expert, those of one in the order of tokens. An expert
    `num_experts` means none at all. Rows that are only padding come from slot T x K.
    """
    flat = experts_TK.flatten()
    order = torch.argsort(flat, stable=True)
    in_order = flat[order]
    ends = torch.searchsorted(
        in_order, torch.arange(num_experts, device=flat.device), right=True
    )
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    if room.rows is not None:
        places = (
            in_order * room.rows
            + torch.arange(len(flat), device=flat.device)
            - torch.cat([starts, ends[-1:]])[in_order]
        )
        slots = flat.new_full((num_experts * room.rows + 1,), len(flat))
        slots.index_copy_(0, places.clamp(max=num_experts * room.rows), order)
        return slots[:-1], room.rows
    if not room.dropless:
        order = order[: int(ends[-1])]
    return order, ends - starts


@dataclass(frozen=True)
class _Way:
    """Numbers of rows by rank, and their order on arrival."""

    send: list[int]
    receive: list[int]
    gathered: list[int]
    """Rows of each etp rank."""
    by_expert_R: Tensor
    back_R: Tensor
    counts: Counts


class AllToAllDispatcher:
    """A row goes to the ep rank that has its expert; the etp ranks there show each
    other theirs, since each has a part of the expert.
    """

    def __init__(self, num_experts: int, ep_group: Group, etp_group: Group) -> None:
        self.num_experts = num_experts
        self.ep_group = ep_group
        self.etp_group = etp_group

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, room: Capacity) -> Dispatched:
        """Rows of this rank's experts from all ranks."""
        slots, counts = sort_slots(experts_TK, self.num_experts, room)
        rows = take_tokens(x_TH, slots, experts_TK.shape[1])
        if self.ep_group is None and self.etp_group is None:
            return Dispatched(
                rows,
                counts,
                lambda outputs, weights: weigh_and_sum(outputs, weights, slots),
            )
        way = (
            self._counted_way(counts)
            if isinstance(counts, Tensor)
            else self._even_way(counts, slots.device)
        )
        arrived = gather(
            exchange(rows, way.send, way.receive, self.ep_group),
            way.gathered,
            self.etp_group,
        )

        def combine(outputs_RH: Tensor, weights_TK: Tensor) -> Tensor:
            summed = sum_and_scatter(
                reorder(outputs_RH, way.back_R), way.gathered, self.etp_group
            )
            return weigh_and_sum(
                exchange(summed, way.receive, way.send, self.ep_group), weights_TK, slots
            )

        return Dispatched(reorder(arrived, way.by_expert_R), way.counts, combine)

    def _even_way(self, rows: int, device: torch.device) -> _Way:
        """Every rank gives every expert as many rows."""
        ep = collectives.size(self.ep_group)
        etp = collectives.size(self.etp_group)
        local = self.num_experts // ep
        of_row = torch.arange(local, device=device).repeat_interleave(rows).repeat(etp * ep)
        return _way(
            [rows * local] * ep,
            [rows * local] * ep,
            [rows * local * ep] * etp,
            of_row,
            rows * ep * etp,
        )

    def _counted_way(self, counts_E: Tensor) -> _Way:
        ep = collectives.size(self.ep_group)
        etp = collectives.size(self.etp_group)
        leaving = counts_E.view(ep, -1)
        arriving = collectives.all_gather_rows(
            collectives.all_to_all_rows(leaving, self.ep_group), self.etp_group
        )
        numbers = torch.cat(
            [leaving.sum(1), arriving.sum(1)]
        ).tolist()  # the host waits here
        send = numbers[:ep]
        by_rank = numbers[ep:]
        first = ep * collectives.rank(self.etp_group)
        gathered = [sum(by_rank[start : start + ep]) for start in range(0, etp * ep, ep)]
        experts = torch.arange(leaving.shape[1], device=counts_E.device).repeat(etp * ep)
        of_row = torch.repeat_interleave(
            experts, arriving.flatten(), output_size=sum(gathered)
        )
        return _way(send, by_rank[first : first + ep], gathered, of_row, arriving.sum(0))


def _way(
    send: list[int],
    receive: list[int],
    gathered: list[int],
    expert_of_row: Tensor,
    counts: Counts,
) -> _Way:
    by_expert = torch.argsort(expert_of_row, stable=True)
    return _Way(send, receive, gathered, by_expert, torch.argsort(by_expert), counts)


class AllGatherDispatcher:
    """Every rank sees the tokens of all ranks that share its experts and picks the rows
    of its own; outputs are summed where the tokens came from. More bytes, but no
    message depends on the data.
    """

    def __init__(self, num_experts: int, ep_group: Group, etp_group: Group) -> None:
        self.groups = etp_group, ep_group
        self.local = num_experts // collectives.size(ep_group)
        self.first = self.local * collectives.rank(ep_group)

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, room: Capacity) -> Dispatched:
        """Rows of this rank's experts from all ranks."""
        experts = experts_TK
        for group in self.groups:
            experts = collectives.all_gather_rows(experts, group)
        mine = experts - self.first
        mine = mine.masked_fill((mine < 0) | (mine >= self.local), self.local)
        ranks = len(experts) // len(experts_TK)
        slots, counts = sort_slots(
            mine,
            self.local,
            Capacity(False, None if room.rows is None else room.rows * ranks),
        )

        def combine(outputs_RH: Tensor, weights_TK: Tensor) -> Tensor:
            sums = weigh_and_sum(outputs_RH, self._from_all(weights_TK), slots)
            for group in reversed(self.groups):
                size = collectives.size(group)
                sums = sum_and_scatter(sums, [len(sums) // size] * size, group)
            return sums

        return Dispatched(
            take_tokens(self._from_all(x_TH), slots, experts.shape[1]), counts, combine
        )

    def _from_all(self, rows: Tensor) -> Tensor:
        for group in self.groups:
            rows = gather(rows, [len(rows)] * collectives.size(group), group)
        return rows
