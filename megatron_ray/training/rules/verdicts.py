"""Decides what follows from a step that breaks a rule.

Owns: the order of computing again, elsewhere, and the rule's own action; their wording.
Pure: numbers come in as values. Must not know: the model, checkpoints.
"""

from collections.abc import Sequence
from enum import StrEnum
from math import isfinite

from megatron_ray.config.faults.rules import RuleConfig

_MOST_LISTED = 8
"""Ranks that are listed at most."""


class Conclusion(StrEnum):
    """What the numbers of a step mean."""

    GOOD = "good"
    RERUN = "rerun"
    """The step is computed again, on the same devices."""
    RECHECK = "recheck"
    """The result is the same there: the step is computed again on other devices."""
    CONFIRMED = "confirmed"
    """The step itself breaks the rule, whose action follows."""
    TRANSIENT = "transient"
    """Computed again, the step is good: a transient fault of the hardware."""
    PERSISTENT = "persistent"
    """On other devices the step is good: a persistent fault of those before."""


def conclude(
    *,
    is_broken: bool,
    reruns: bool,
    is_second: bool,
    was_elsewhere: bool,
    can_move: bool,
) -> Conclusion:
    """Returns what the numbers of a step mean.

    `is_broken`: they break a rule, with `reruns` one that has its steps computed again.
    `is_second`: the step was computed on these devices before, `was_elsewhere`: on others,
    and broke a rule. `can_move`: there is a driver that can restart the run elsewhere.
    """
    if not is_broken:
        if was_elsewhere:
            return Conclusion.PERSISTENT
        if is_second:
            return Conclusion.TRANSIENT
        return Conclusion.GOOD
    if not reruns or was_elsewhere:
        return Conclusion.CONFIRMED
    if not is_second:
        return Conclusion.RERUN
    if can_move:
        return Conclusion.RECHECK
    return Conclusion.CONFIRMED


def describe_break(
    rule: RuleConfig, step: int, loss: float, grad_norm: float, limit: float
) -> str:
    """Returns which number of a step breaks a rule, and what it was compared with."""
    if rule.when == "not_finite":
        return f"the loss of step {step} is {loss:g} and its gradient norm {grad_norm:g}"
    name, value = "loss", loss
    if rule.when == "large_grad_norm":
        name, value = "gradient norm", grad_norm
    sentence = f"the {name} of step {step} is {value:.4g}, above "
    if rule.limit is not None:
        return f"{sentence}the limit of {rule.limit:g}"
    baseline = f"maximum of the first {rule.samples} steps"
    if rule.baseline == "recent_median":
        baseline = f"median of the last {rule.samples} steps"
    return f"{sentence}{rule.factor:g} times the {baseline}, which is {limit / rule.factor:.4g}"


def describe_ranks(ranks: Sequence[int]) -> str:
    """Returns on which ranks the numbers were not finite before their reduction."""
    if not ranks:
        return ", though the own loss and gradients of every rank were finite"
    listed = ", ".join(map(str, ranks[:_MOST_LISTED]))
    if len(ranks) == 1:
        return f"; before the reduction that was so on rank {listed}"
    if len(ranks) > _MOST_LISTED:
        listed += f" and {len(ranks) - _MOST_LISTED} others"
    return f"; before the reduction that was so on ranks {listed}"


def suspect_rank(parts: Sequence[Sequence[float]]) -> int:
    """Returns the rank that may have computed a step wrongly.

    `parts` are, by rank, its part of the step's loss, tokens and squared gradient norm. A
    rank with a number that is not finite comes first, then the one with the largest loss
    of a token. It is a guess: a rank before it may have passed on wrong numbers.
    """

    def conspicuous(rank: int) -> tuple[bool, bool, float, float]:
        loss, num_tokens, squares = parts[rank]
        if not isfinite(loss):
            return True, True, 0.0, 0.0
        if not isfinite(squares):
            return False, True, 0.0, 0.0
        return False, False, loss / max(num_tokens, 1.0), squares

    return max(range(len(parts)), key=conspicuous)
