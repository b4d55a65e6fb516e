"""In which order a pipeline rank computes.

Owns: GPipe, 1F1B, interleaved, ZB-H1, ZB-V. Pure; must not know: sends, torch.

GPipe: Huang et al. 2019. 1F1B and interleaving: Narayanan et al. 2021, with Megatron's
warm-up counts. ZB-H1: Qi et al. 2023, which computes weight gradients apart, when
nothing else is there to do, with no more activations than 1F1B's first rank holds. ZB-V
(the same paper): so too, with two chunks per rank in a V, which halves what is left of
the bubble.
"""

from collections import Counter
from collections.abc import Callable
from typing import Literal

from megatron_ray.pipeline_parallel.schedules.actions import Action, Op, Order, StageMap

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]


def stage_map(name: ScheduleName, pp: int, vpp: int) -> StageMap:
    """Where a schedule wants the stages.

    Raises ValueError when it cannot have so many.
    """
    return StageMap(pp, vpp, "v" if name == "zb-v" else "loop")


def compute_orders(
    name: ScheduleName,
    pp: int,
    num_microbatches: int,
    vpp: int = 1,
    group: int | None = None,
) -> list[Order]:
    """Every rank's computing actions.

    `group`: microbatches per chunk in a row, interleaved only; pp when not given.

    Raises ValueError for a schedule that cannot have so many chunks, or groups smaller
    than the pipeline.
    """
    if pp < 1 or num_microbatches < 1 or vpp < 1:
        raise ValueError(
            f"pp={pp}, vpp={vpp} and num_microbatches={num_microbatches} must be at least 1"
        )
    if name == "interleaved":
        size = pp if group is None else group
        if size < pp:
            raise ValueError(
                f"groups of {size} microbatches are smaller than the pipeline of {pp} "
                "ranks: the last one would wait"
            )
        return [_interleaved(pp, rank, vpp, num_microbatches, size) for rank in range(pp)]
    if name == "zb-v":
        if vpp != 2:
            raise ValueError(f"schedule zb-v has two chunks per rank, not vpp={vpp}")
        return [_zb_v(pp, rank, num_microbatches) for rank in range(pp)]
    if vpp != 1:
        raise ValueError(
            f"schedule {name} has one chunk per rank; vpp={vpp} needs interleaved"
        )
    if name == "zb-h1":
        return _zb_h1(pp, num_microbatches)
    order: Callable[[int, int, int], Order] = _gpipe if name == "gpipe" else _one_f_one_b
    return [order(pp, rank, num_microbatches) for rank in range(pp)]


def most_activations(
    name: ScheduleName, pp: int, num_microbatches: int, vpp: int = 1
) -> int:
    """What the rank that holds most (the first one, but for a short ZB-V) holds at once
    at most: microbatches of a chunk. Without making the orders.
    """
    if name == "gpipe":
        return num_microbatches
    if name == "interleaved":
        largest = -(-num_microbatches // max(1, num_microbatches // pp))
        return min(_interleaved_warmup(pp, 0, vpp, largest) + 1, num_microbatches * vpp)
    return min(pp, num_microbatches) * vpp


def _gpipe(pp: int, rank: int, count: int) -> Order:
    forwards = [Action(Op.FORWARD, 0, microbatch) for microbatch in range(count)]
    return forwards + [Action(Op.BACKWARD, 0, microbatch) for microbatch in range(count)]


def _one_f_one_b(pp: int, rank: int, count: int) -> Order:
    warmup = min(pp - rank - 1, count)
    return _steady(
        [Action(Op.FORWARD, 0, index) for index in range(count)],
        [Action(Op.BACKWARD, 0, index) for index in range(count)],
        warmup,
    )


def _steady(forwards: Order, backwards: Order, warmup: int) -> Order:
    """`warmup` forwards, then one forward and one backward in turn, then what is left."""
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += (forward, backward)
    return order + backwards[len(forwards) - warmup :]


def _interleaved(pp: int, rank: int, vpp: int, count: int, group: int) -> Order:
    """Chunk by chunk within each group of microbatches.

    Megatron refuses a last group smaller than the pipeline, because ranks would wait
    for each other for ever; here what is left over is spread over all groups.
    """
    sizes = _group_sizes(count, group)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    virtual = [
        (chunk, microbatch)
        for start, size in zip(starts, sizes, strict=True)
        for chunk in range(vpp)
        for microbatch in range(start, start + size)
    ]
    warmup = min(_interleaved_warmup(pp, rank, vpp, sizes[0]), len(virtual))
    forwards = [Action(Op.FORWARD, chunk, microbatch) for chunk, microbatch in virtual]
    backwards = [
        Action(Op.BACKWARD, vpp - 1 - chunk, microbatch) for chunk, microbatch in virtual
    ]
    return _steady(forwards, backwards, warmup)


def _interleaved_warmup(pp: int, rank: int, vpp: int, group: int) -> int:
    """Forwards before the first backward, as Megatron counts them."""
    return (pp - rank - 1) * 2 + (vpp - 1) * group


def _group_sizes(count: int, group: int) -> list[int]:
    """Largest first; none smaller than `group` unless there is one only."""
    groups = max(1, count // group)
    size, more = divmod(count, groups)
    return [size + 1] * more + [size] * (groups - more)


def _zb_h1(pp: int, count: int) -> list[Order]:
    """1F1B's order of forwards and backwards with every weight gradient put off until
    its rank would wait.

    Rank r has a lag of r: it keeps so many weight gradients back while it has forwards
    to do, and spends them in the cool-down, where 1F1B waits for gradients from the
    next rank.
    """
    orders = []
    for rank in range(pp):
        order: Order = []
        done = 0
        remaining = pp - rank - 1
        for action in _one_f_one_b(pp, rank, count):
            if action.op is Op.FORWARD:
                order.append(action)
                continue
            order.append(Action(Op.BACKWARD_INPUT, 0, action.microbatch))
            cooling = action.microbatch >= count - remaining
            if action.microbatch - done >= rank or cooling:
                order.append(Action(Op.BACKWARD_WEIGHT, 0, done))
                done += 1
        order += [
            Action(Op.BACKWARD_WEIGHT, 0, microbatch) for microbatch in range(done, count)
        ]
        orders.append(order)
    return orders


def _zb_v(pp: int, rank: int, count: int) -> Order:
    """Stages go down the ranks and come back, so the last rank has its second chunk's
    input at once and the first one its loss.

    Rank r fills up with 2 (pp - r) - 1 microbatches of its first chunk. By the time
    they have come back it goes round both chunks, each with forward, input and weight
    gradient, and never waits again; weight gradients are put off only while the
    pipeline drains. Of fewer than 2 pp microbatches it is the same order with the
    others left out.
    """
    full = max(count, 2 * pp)
    order: Order = []
    done: Counter[tuple[Op, int]] = Counter()

    def take(times: int, *what: tuple[Op, int]) -> None:
        for op, chunk in what * times:
            order.append(Action(op, chunk, done[op, chunk]))
            done[op, chunk] += 1

    down, back = (
        [(op, chunk) for op in (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)]
        for chunk in (0, 1)
    )
    take(2 * (pp - rank) - 1, down[0])
    take(rank, back[0], down[0])
    take(pp - rank, *back)
    take(full - done[down[0]], *down, *back)
    take(full - done[back[0]], *down[1:], *back)
    take(rank, down[1], back[1])
    take(pp - rank, *down[1:])
    take(full - done[back[2]], back[2])
    take(full - done[down[2]], down[2])
    return [action for action in order if action.microbatch < count]
