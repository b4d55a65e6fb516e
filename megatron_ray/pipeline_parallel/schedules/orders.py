"""Makes the order of computing actions of each pipeline rank.

Owns: GPipe, 1F1B, interleaved, ZB-H1, ZB-V. Pure; must not know: sends, torch.

GPipe: Huang et al. 2019. 1F1B and interleaving: Narayanan et al. 2021, with Megatron's
warm-up counts. ZB-H1: Qi et al. 2023, which computes weight gradients separately, in
idle time, with at most the activations of 1F1B's first rank. ZB-V (same paper): the
same with two chunks per rank in a V, which halves the remaining bubble.

1F1B and interleaving can be in pairs: each forward pass of the steady state is then
interleaved with the backward pass of an earlier microbatch, as with Megatron's
overlap_moe_expert_parallel_comm. A rank sends results after both, so that twice as many
microbatches are on their way as without pairs, and warm-up takes one more.

F, B and W are the forward, the gradient of the input and that of the weights.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from megatron_ray.pipeline_parallel.schedules.actions import Action, Op, Order, StageMap

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]
PAIRED: tuple[ScheduleName, ...] = ("1f1b", "interleaved")
"""Schedules whose orders can be in pairs."""


def stage_map(name: ScheduleName, pp: int, vpp: int) -> StageMap:
    """Returns the mapping of stages to ranks of a schedule.

    Raises ValueError when the schedule does not support `vpp` chunks per rank.
    """
    if name == "zb-v":
        return StageMap(pp, vpp, "v")
    return StageMap(pp, vpp, "loop")


def compute_orders(
    name: ScheduleName,
    pp: int,
    num_microbatches: int,
    vpp: int = 1,
    group: int | None = None,
    *,
    in_pairs: bool = False,
) -> list[Order]:
    """Returns the computing actions of every rank.

    `group`: consecutive microbatches per chunk, for interleaved only; default pp.
    Raises ValueError for sizes that the schedule does not support, groups smaller than
    the pipeline, or a schedule that has no pairs.
    """
    _check_sizes(name, pp, num_microbatches, vpp)
    if in_pairs and name not in PAIRED:
        raise ValueError(f"schedule {name} has no pairs; use one of {', '.join(PAIRED)}")
    if name == "interleaved":
        size = pp if group is None else group
        if size < pp:
            raise ValueError(
                f"groups of {size} microbatches are smaller than the pipeline of {pp} "
                f"ranks; use groups of at least {pp}"
            )
        sizes = _group_sizes(num_microbatches, size)
        return [_interleaved(pp, rank, vpp, sizes, in_pairs=in_pairs) for rank in range(pp)]
    orders = []
    for rank in range(pp):
        if name == "gpipe":
            orders.append(_gpipe(num_microbatches))
        elif name == "1f1b":
            orders.append(_1f1b(pp, rank, num_microbatches, in_pairs=in_pairs))
        elif name == "zb-h1":
            orders.append(_zb_h1(pp, rank, num_microbatches))
        else:
            orders.append(_zb_v(pp, rank, num_microbatches))
    return orders


def _check_sizes(name: ScheduleName, pp: int, num_microbatches: int, vpp: int) -> None:
    """Raises ValueError for sizes that a schedule does not support."""
    if pp < 1 or num_microbatches < 1 or vpp < 1:
        raise ValueError(
            f"pp={pp}, vpp={vpp} and num_microbatches={num_microbatches} must be at least 1"
        )
    if name == "zb-v" and vpp != 2:
        raise ValueError(f"schedule zb-v has two chunks per rank, not vpp={vpp}")
    if name not in ("zb-v", "interleaved") and vpp != 1:
        raise ValueError(
            f"schedule {name} has one chunk per rank; vpp={vpp} needs interleaved"
        )


def _row(op: Op, num_microbatches: int) -> Order:
    """Returns one action of chunk 0 for every microbatch."""
    return [Action(op, 0, microbatch) for microbatch in range(num_microbatches)]


def _gpipe(num_microbatches: int) -> Order:
    return _row(Op.FORWARD, num_microbatches) + _row(Op.BACKWARD, num_microbatches)


def _1f1b(pp: int, rank: int, num_microbatches: int, *, in_pairs: bool = False) -> Order:
    forwards = _row(Op.FORWARD, num_microbatches)
    backwards = _row(Op.BACKWARD, num_microbatches)
    # Number of forwards until the first gradient arrives from the last rank.
    num_warmup = pp - rank - 1
    if in_pairs:
        num_warmup = 2 * num_warmup + 1
    return _warmup_steady_cooldown(forwards, backwards, num_warmup, in_pairs=in_pairs)


def _warmup_steady_cooldown(
    forwards: Order, backwards: Order, num_warmup: int, *, in_pairs: bool
) -> Order:
    """Returns warm-up, then alternating forwards and backwards, then cool-down."""
    order = forwards[:num_warmup]
    for index, forward in enumerate(forwards[num_warmup:]):
        order.append(forward._replace(is_paired=in_pairs))
        order.append(backwards[index])
    num_steady = max(0, len(forwards) - num_warmup)
    return order + backwards[num_steady:]


def _interleaved(
    pp: int, rank: int, vpp: int, sizes: Sequence[int], *, in_pairs: bool
) -> Order:
    """Returns 1F1B over chunks, chunk by chunk within each group of microbatches.

    `sizes` are those of the groups. Megatron rejects a last group smaller than the
    pipeline, because ranks would deadlock; here the remainder is distributed over all
    groups.
    """
    forwards: Order = []
    backwards: Order = []
    start = 0
    for size in sizes:
        for chunk in range(vpp):
            for microbatch in range(start, start + size):
                forwards.append(Action(Op.FORWARD, chunk, microbatch))
                # Gradients pass through the chunks in the opposite order.
                backwards.append(Action(Op.BACKWARD, vpp - 1 - chunk, microbatch))
        start += size
    # Megatron's count: all chunks but the last of the first group, and two more for every
    # later rank, through which activations and gradients pass.
    num_warmup = (pp - rank - 1) * 2 + (vpp - 1) * sizes[0] + int(in_pairs)
    return _warmup_steady_cooldown(forwards, backwards, num_warmup, in_pairs=in_pairs)


def _group_sizes(num_microbatches: int, group: int) -> list[int]:
    """Returns group sizes, largest first; at least `group`, except for a single group."""
    num_groups = max(1, num_microbatches // group)
    size, num_larger = divmod(num_microbatches, num_groups)
    return [size + 1] * num_larger + [size] * (num_groups - num_larger)


def _zb_h1(pp: int, rank: int, num_microbatches: int) -> Order:
    """Returns 1F1B's order with every W deferred until its rank would be idle.

    Rank r defers r Ws while it has forwards left, and runs them in the cool-down, where
    1F1B waits for gradients from the next rank.
    """
    order: Order = []
    num_weight_grads = 0
    num_cooldown = pp - rank - 1
    for action in _1f1b(pp, rank, num_microbatches):
        if action.op is Op.FORWARD:
            order.append(action)
            continue
        order.append(Action(Op.BACKWARD_INPUT, 0, action.microbatch))
        is_cooldown = action.microbatch >= num_microbatches - num_cooldown
        is_lag_full = action.microbatch - num_weight_grads >= rank
        if is_lag_full or is_cooldown:
            order.append(Action(Op.BACKWARD_WEIGHT, 0, num_weight_grads))
            num_weight_grads += 1
    # The remaining deferred Ws, for which there was no idle time.
    return order + _row(Op.BACKWARD_WEIGHT, num_microbatches)[num_weight_grads:]


_F0 = (Op.FORWARD, 0)
_F1 = (Op.FORWARD, 1)
_B0 = (Op.BACKWARD_INPUT, 0)
_B1 = (Op.BACKWARD_INPUT, 1)
_W0 = (Op.BACKWARD_WEIGHT, 0)
_W1 = (Op.BACKWARD_WEIGHT, 1)


def _zb_v(pp: int, rank: int, num_microbatches: int) -> Order:
    """Returns one rank's order of ZB-V; F0 is the forward of chunk 0.

    Stages run from rank 0 to the last rank and back. So the last rank's second chunk
    directly follows its first, and the loss is on rank 0. Rank r warms up with 2 (pp -
    r) - 1 microbatches of its first chunk. When these return, it alternates between
    both chunks, each with F, B and W, without idle time. Ws are deferred only while the
    pipeline drains.
    """
    # With fewer microbatches than the pipeline needs, the order is that of 2 pp
    # microbatches without the missing ones.
    num_full = max(num_microbatches, 2 * pp)
    order: Order = []
    num_appended: Counter[tuple[Op, int]] = Counter()

    def repeat(times: int, *actions: tuple[Op, int]) -> None:
        """Appends the actions `times` times, each with its next microbatch."""
        for op, chunk in actions * times:
            order.append(Action(op, chunk, num_appended[op, chunk]))
            num_appended[op, chunk] += 1

    # Warm-up: chunk 0 only, then chunk 1 of returning microbatches beside chunk 0 of new
    # ones.
    repeat(2 * (pp - rank) - 1, _F0)
    repeat(rank, _F1, _F0)
    # The last stage has computed a loss, so the backward passes of chunk 1 begin.
    repeat(pp - rank, _F1, _B1, _W1)
    # Steady state, until chunk 0 and then chunk 1 have processed all microbatches.
    repeat(num_full - num_appended[_F0], _F0, _B0, _W0, _F1, _B1, _W1)
    repeat(num_full - num_appended[_F1], _B0, _W0, _F1, _B1, _W1)
    # Cool-down: Bs first, because other ranks wait for them but not for Ws.
    repeat(rank, _B0, _B1)
    repeat(pp - rank, _B0, _W0)
    repeat(num_full - num_appended[_W1], _W1)
    repeat(num_full - num_appended[_W0], _W0)
    return [action for action in order if action.microbatch < num_microbatches]
