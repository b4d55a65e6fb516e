"""Makes the order in which each pipeline rank computes.

Owns: GPipe, 1F1B, interleaved, ZB-H1, ZB-V. Pure; must not know: sends, torch.

GPipe: Huang et al. 2019. 1F1B and interleaving: Narayanan et al. 2021, with Megatron's
warm-up counts. ZB-H1: Qi et al. 2023, which computes weight gradients apart, when
nothing else is there to do, with no more activations than 1F1B's first rank has. ZB-V
(the same paper): so too, with two chunks per rank in a V, which halves what is left of
the bubble.

F, B and W stand for forward, gradient of the input and gradient of the weights.
"""

from collections import Counter
from typing import Literal

from megatron_ray.pipeline_parallel.schedules.actions import Action, Op, Order, StageMap

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]


def stage_map(name: ScheduleName, pp: int, vpp: int) -> StageMap:
    """Returns which rank has which stage in a schedule.

    Raises ValueError when it cannot have so many chunks per rank.
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
) -> list[Order]:
    """Returns every rank's computing actions.

    `group`: microbatches per chunk in a row, interleaved only; pp when not given.
    Raises ValueError for a schedule that cannot have so many chunks, or groups smaller
    than the pipeline.
    """
    _check_sizes(name, pp, num_microbatches, vpp)
    if name == "interleaved":
        size = pp if group is None else group
        if size < pp:
            raise ValueError(
                f"groups of {size} microbatches are smaller than the pipeline of {pp} "
                "ranks: the last one would wait"
            )
        return [_interleaved(pp, rank, vpp, num_microbatches, size) for rank in range(pp)]
    orders = []
    for rank in range(pp):
        if name == "gpipe":
            orders.append(_gpipe(num_microbatches))
        elif name == "1f1b":
            orders.append(_one_f_one_b(pp, rank, num_microbatches))
        elif name == "zb-h1":
            orders.append(_zb_h1(pp, rank, num_microbatches))
        else:
            orders.append(_zb_v(pp, rank, num_microbatches))
    return orders


def _check_sizes(name: ScheduleName, pp: int, num_microbatches: int, vpp: int) -> None:
    """Raises ValueError for sizes that a schedule cannot have."""
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
    """Returns one action of the only chunk for every microbatch."""
    return [Action(op, 0, microbatch) for microbatch in range(num_microbatches)]


def _gpipe(num_microbatches: int) -> Order:
    return _row(Op.FORWARD, num_microbatches) + _row(Op.BACKWARD, num_microbatches)


def _one_f_one_b(pp: int, rank: int, num_microbatches: int) -> Order:
    forwards = _row(Op.FORWARD, num_microbatches)
    backwards = _row(Op.BACKWARD, num_microbatches)
    # As many as it takes until the first gradient arrives from the last rank.
    num_warmup = min(pp - rank - 1, num_microbatches)
    return _one_forward_one_backward(forwards, backwards, num_warmup)


def _one_forward_one_backward(forwards: Order, backwards: Order, num_warmup: int) -> Order:
    """Returns the warm-up, then a forward and a backward in turn, then the cool-down."""
    order = forwards[:num_warmup]
    num_steady = len(forwards) - num_warmup
    for index in range(num_steady):
        order.append(forwards[num_warmup + index])
        order.append(backwards[index])
    return order + backwards[num_steady:]


def _interleaved(pp: int, rank: int, vpp: int, num_microbatches: int, group: int) -> Order:
    """Returns 1F1B over chunks: chunk by chunk within each group of microbatches.

    Megatron refuses a last group smaller than the pipeline, because ranks would wait
    for each other for ever; here what is left over is spread over all groups.
    """
    sizes = _group_sizes(num_microbatches, group)
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
    # rank behind this one, which the activations pass on their way there and back.
    num_warmup = (pp - rank - 1) * 2 + (vpp - 1) * sizes[0]
    return _one_forward_one_backward(forwards, backwards, min(num_warmup, len(forwards)))


def _group_sizes(num_microbatches: int, group: int) -> list[int]:
    """Returns group sizes, largest first; none is below `group` unless it is the only one."""
    num_groups = max(1, num_microbatches // group)
    size, num_larger = divmod(num_microbatches, num_groups)
    return [size + 1] * num_larger + [size] * (num_groups - num_larger)


def _zb_h1(pp: int, rank: int, num_microbatches: int) -> Order:
    """Returns 1F1B's order with every W put off until its rank would wait.

    Rank r has a lag of r: it keeps so many Ws back while it has forwards to do, and
    spends them in the cool-down, where 1F1B waits for gradients from the next rank.
    """
    order: Order = []
    num_weights = 0
    num_cooldown = pp - rank - 1
    for action in _one_f_one_b(pp, rank, num_microbatches):
        if action.op is Op.FORWARD:
            order.append(action)
            continue
        order.append(Action(Op.BACKWARD_INPUT, 0, action.microbatch))
        is_cooldown = action.microbatch >= num_microbatches - num_cooldown
        has_lag = action.microbatch - num_weights >= rank
        if has_lag or is_cooldown:
            order.append(Action(Op.BACKWARD_WEIGHT, 0, num_weights))
            num_weights += 1
    # What was kept back for longer than there was anything to wait for.
    return order + _row(Op.BACKWARD_WEIGHT, num_microbatches)[num_weights:]


_F0 = (Op.FORWARD, 0)
_F1 = (Op.FORWARD, 1)
_B0 = (Op.BACKWARD_INPUT, 0)
_B1 = (Op.BACKWARD_INPUT, 1)
_W0 = (Op.BACKWARD_WEIGHT, 0)
_W1 = (Op.BACKWARD_WEIGHT, 1)


def _zb_v(pp: int, rank: int, num_microbatches: int) -> Order:
    """Returns one rank's order of ZB-V; F0 is the forward of chunk 0.

    Stages go down the ranks and come back, so the last rank has its second chunk's
    input at once and the first one its loss. Rank r fills up with 2 (pp - r) - 1
    microbatches of its first chunk. By the time they have come back it goes round both
    chunks, each with F, B and W, and never waits again; Ws are put off only while the
    pipeline drains.
    """
    # Fewer microbatches than the pipeline takes have the same order with the others left
    # out.
    num_full = max(num_microbatches, 2 * pp)
    order: Order = []
    num_done: Counter[tuple[Op, int]] = Counter()

    def repeat(times: int, *actions: tuple[Op, int]) -> None:
        """Appends the actions so many times, each with its own next microbatch."""
        for op, chunk in actions * times:
            order.append(Action(op, chunk, num_done[op, chunk]))
            num_done[op, chunk] += 1

    # Warm-up: down to the last rank and back, then what comes back beside what goes down.
    repeat(2 * (pp - rank) - 1, _F0)
    repeat(rank, _F1, _F0)
    # The last stage has its loss: the backward passes of chunk 1 begin.
    repeat(pp - rank, _F1, _B1, _W1)
    # Steady state, until chunk 0 has seen all microbatches and then chunk 1.
    repeat(num_full - num_done[_F0], _F0, _B0, _W0, _F1, _B1, _W1)
    repeat(num_full - num_done[_F1], _B0, _W0, _F1, _B1, _W1)
    # Cool-down: other ranks wait for Bs, none for a W.
    repeat(rank, _B0, _B1)
    repeat(pp - rank, _B0, _W0)
    repeat(num_full - num_done[_W1], _W1)
    repeat(num_full - num_done[_W0], _W0)
    return [action for action in order if action.microbatch < num_microbatches]
