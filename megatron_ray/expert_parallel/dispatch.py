"""Dispatches tokens to the ranks of their experts, and combines the outputs.

Owns: the two dispatchers, `alltoall` and `allgather`. Must not know: the computation of
an expert, the routing.

Experts are assigned to ep ranks in order, each split over etp. Every rank has different
tokens (under tensor parallelism due to sequence parallelism), so dispatch does not
depend on the layout of the dense layers.

An expert's number of rows depends on the data, and the host needs it to size messages
and buffers. This is the only device synchronization of a step. It is avoided if all
experts have equally many rows (`Capacity.rows_per_expert`).

Shapes: T tokens of this rank, K experts of a token, E experts, L of them on this rank,
H hidden, R rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ray.distributed import collectives
from megatron_ray.distributed.collectives import Group
from megatron_ray.distributed.interleaver import Interleaver
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
    """Rows for this rank's experts, and the function that returns their outputs."""

    rows_RH: Tensor
    counts: Counts
    """Rows of each of this rank's experts, in order."""
    combine: Callable[[Tensor, Tensor], Tensor]
    """(the experts' outputs [R, H], weights [T, K]) -> weighted sums [T, H]."""


@dataclass(frozen=True)
class Capacity:
    """Bounds on the rows per expert, independent of the data."""

    dropless: bool = True
    """Whether every token goes to all of its experts."""
    rows_per_expert: int | None = None
    """Rows that each rank sends to every expert, padded with zeros; None: the number of
    tokens that chose it."""


def sort_slots(
    experts_TK: Tensor, num_experts: int, capacity: Capacity
) -> tuple[Tensor, Counts]:
    """Returns (slots [R], rows of each expert).

    Row r comes from slot slots[r] of the flattened choice. Rows are sorted by expert,
    then by token. Expert `num_experts` means no expert. Padding rows come from slot T x
    K.
    """
    # The sort is stable, so rows of one expert stay in the order of tokens.
    flat = experts_TK.flatten()
    order = torch.argsort(flat, stable=True)
    sorted_experts = flat[order]
    ends = torch.searchsorted(
        sorted_experts, torch.arange(num_experts, device=flat.device), right=True
    )
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    if capacity.rows_per_expert is not None:
        # Dropped slots are those of expert `num_experts`, after the last end.
        starts = torch.cat([starts, ends[-1:]])
        rank_in_expert = (
            torch.arange(len(flat), device=flat.device) - starts[sorted_experts]
        )
        rows = sorted_experts * capacity.rows_per_expert + rank_in_expert
        num_rows = num_experts * capacity.rows_per_expert
        # An extra last row collects all dropped slots and is removed.
        slots = flat.new_full((num_rows + 1,), len(flat))
        slots.index_copy_(0, rows.clamp(max=num_rows), order)
        return slots[:-1], capacity.rows_per_expert
    if not capacity.dropless:
        order = order[: int(ends[-1])]  # host waits here
    return order, ends - starts


@dataclass(frozen=True)
class AllToAllPlan:
    """The number of rows between each pair of ranks, and their order on arrival."""

    send: list[int]
    """Rows to each ep rank."""
    receive: list[int]
    """Rows from each ep rank."""
    gathered: list[int]
    """Rows received by each etp rank."""
    to_expert_order_R: Tensor
    """Rows arrive by etp rank, then by ep rank, then by expert; this sorts them by
    expert."""
    to_arrival_order_R: Tensor
    """The inverse."""
    counts: Counts
    """Rows of each expert of this rank."""

    @classmethod
    def of(
        cls,
        send: list[int],
        receive: list[int],
        gathered: list[int],
        expert_of_row_R: Tensor,
        counts: Counts,
    ) -> "AllToAllPlan":
        """Returns the plan for rows that arrive with these (local) experts."""
        to_expert_order = torch.argsort(expert_of_row_R, stable=True)
        to_arrival_order = torch.argsort(to_expert_order)
        return cls(send, receive, gathered, to_expert_order, to_arrival_order, counts)


class AllToAllDispatcher:
    """Sends each row to the ep rank of its expert.

    Each etp rank has a part of the expert, so etp ranks gather each other's rows. While
    rows are on their way, the interleaver may run another pass.
    """

    def __init__(
        self, num_experts: int, ep_group: Group, etp_group: Group, interleaver: Interleaver
    ) -> None:
        self.num_experts = num_experts
        self.ep_group = ep_group
        self.etp_group = etp_group
        self.interleaver = interleaver

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, capacity: Capacity) -> Dispatched:
        """Returns the rows of this rank's experts from all ranks."""
        # Rows sorted by expert are also sorted by rank, since ep ranks have experts in
        # order.
        slots, counts = sort_slots(experts_TK, self.num_experts, capacity)
        rows = take_tokens(x_TH, slots, experts_TK.shape[1])
        if self.ep_group is None and self.etp_group is None:
            return Dispatched(
                rows,
                counts,
                lambda outputs, weights: weigh_and_sum(outputs, weights, slots),
            )
        if isinstance(counts, Tensor):
            plan = self._plan_by_counts(counts)
        else:
            plan = self._plan_evenly(counts, slots.device)
        # First to the ep rank of the expert, then to all etp ranks that share it.
        received = self._exchange(rows, plan.send, plan.receive)
        arrived = gather(received, plan.gathered, self.etp_group)

        def combine(outputs_RH: Tensor, weights_TK: Tensor) -> Tensor:
            # The same exchanges in reverse order; etp ranks have partial sums of every row.
            partial_sums = reorder(outputs_RH, plan.to_arrival_order_R)
            summed = sum_and_scatter(partial_sums, plan.gathered, self.etp_group)
            returned = self._exchange(summed, plan.receive, plan.send)
            return weigh_and_sum(returned, weights_TK, slots)

        return Dispatched(reorder(arrived, plan.to_expert_order_R), plan.counts, combine)

    def _exchange(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> Tensor:
        return exchange(rows, send, receive, self.ep_group, self.interleaver)

    def _plan_evenly(self, rows_per_expert: int, device: torch.device) -> AllToAllPlan:
        """Plans for equally many rows from every rank to every expert."""
        ep = collectives.size(self.ep_group)
        etp = collectives.size(self.etp_group)
        local = self.num_experts // ep
        # Each sender's rows arrive expert by expert.
        expert_of_row = (
            torch.arange(local, device=device)
            .repeat_interleave(rows_per_expert)
            .repeat(etp * ep)
        )
        return AllToAllPlan.of(
            [rows_per_expert * local] * ep,
            [rows_per_expert * local] * ep,
            [rows_per_expert * local * ep] * etp,
            expert_of_row,
            rows_per_expert * ep * etp,
        )

    def _plan_by_counts(self, counts_E: Tensor) -> AllToAllPlan:
        """Plans by the rows of each rank for each expert, which ranks exchange first."""
        ep = collectives.size(self.ep_group)
        # [ep, L]: rows to the experts of each ep rank.
        leaving = counts_E.view(ep, -1)
        received = collectives.all_to_all_rows(leaving, self.ep_group)
        # [etp x ep, L]: rows for the local experts from each rank, over all etp ranks.
        arriving = collectives.all_gather_rows(received, self.etp_group)
        totals = torch.cat([leaving.sum(1), arriving.sum(1)]).tolist()  # host waits here
        send = totals[:ep]
        received_by_etp_rank = list[list[int]]()
        for start in range(ep, len(totals), ep):
            received_by_etp_rank.append(totals[start : start + ep])
        gathered = [sum(rows) for rows in received_by_etp_rank]

        experts = torch.arange(leaving.shape[1], device=counts_E.device)
        expert_of_row = torch.repeat_interleave(
            experts.repeat(len(arriving)), arriving.flatten(), output_size=sum(gathered)
        )
        receive = received_by_etp_rank[collectives.rank(self.etp_group)]
        return AllToAllPlan.of(send, receive, gathered, expert_of_row, arriving.sum(0))


class AllGatherDispatcher:
    """Gathers the tokens of all ranks that share experts and selects its own rows.

    Outputs are summed on the tokens' ranks. This sends more bytes, but message sizes do
    not depend on the data.
    """

    def __init__(self, num_experts: int, ep_group: Group, etp_group: Group) -> None:
        self.groups = (etp_group, ep_group)
        self.num_local = num_experts // collectives.size(ep_group)
        self.first_local = self.num_local * collectives.rank(ep_group)

    def dispatch(self, x_TH: Tensor, experts_TK: Tensor, capacity: Capacity) -> Dispatched:
        """Returns the rows of this rank's experts from all ranks."""
        experts = experts_TK
        for group in self.groups:
            experts = collectives.all_gather_rows(experts, group)
        # Experts of other ranks become `num_local`, which means no expert.
        local = experts - self.first_local
        is_elsewhere = (local < 0) | (local >= self.num_local)
        local = local.masked_fill(is_elsewhere, self.num_local)
        # A local expert processes its rows of all ranks at once.
        rows_per_expert = capacity.rows_per_expert
        if rows_per_expert is not None:
            num_ranks = len(experts) // len(experts_TK)
            rows_per_expert = rows_per_expert * num_ranks
        slots, counts = sort_slots(
            local,
            self.num_local,
            Capacity(dropless=False, rows_per_expert=rows_per_expert),
        )

        def combine(outputs_RH: Tensor, weights_TK: Tensor) -> Tensor:
            # Weighted before the sum over ranks, so that each token is sent once, not K
            # times.
            sums = weigh_and_sum(outputs_RH, self._gather(weights_TK), slots)
            for group in reversed(self.groups):
                size = collectives.size(group)
                sums = sum_and_scatter(sums, [len(sums) // size] * size, group)
            return sums

        rows = take_tokens(self._gather(x_TH), slots, experts.shape[1])
        return Dispatched(rows, counts, combine)

    def _gather(self, rows: Tensor) -> Tensor:
        """Returns the rows of all ranks that share experts."""
        for group in self.groups:
            rows = gather(rows, [len(rows)] * collectives.size(group), group)
        return rows
