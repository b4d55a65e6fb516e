"""ADOPT (Taniguchi et al. 2024), its quasi-hyperbolic form, and with several first moments.

The gradient is divided by the second moment of the updates before it, and clipped; there is
no bias correction. The first update only sets the second moment.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ray.config.optimizer_kinds import first_moment
from megatron_ray.optimizer.rules.elements import Elements, Rates, mean
from megatron_ray.optimizer.update_rule import Moment, UpdateRule


def adopt(elements: Elements, gradient: Tensor, rule: UpdateRule, rates: Rates) -> Elements:
    """Returns weights - lr x m, where m averages normalised gradients."""
    return _update(elements, gradient, rule, rates, [Moment(rule.beta1, 1.0)])


def qhadopt(
    elements: Elements, gradient: Tensor, rule: UpdateRule, rates: Rates
) -> Elements:
    """As ADOPT, with (1 - nu) x normalised gradient + nu x m instead of m."""
    return _update(elements, gradient, rule, rates, [Moment(rule.beta1, rule.nu)])


def aggmo_adopt(
    elements: Elements, gradient: Tensor, rule: UpdateRule, rates: Rates
) -> Elements:
    """As QHADOPT, with several first moments."""
    return _update(elements, gradient, rule, rates, rule.aggregated)


def _update(
    elements: Elements,
    gradient: Tensor,
    rule: UpdateRule,
    rates: Rates,
    moments: Sequence[Moment],
) -> Elements:
    is_first = rates.count == 1
    before = elements.state["exp_avg_sq"]
    squares = gradient * gradient
    state = {
        "exp_avg_sq": torch.where(is_first, squares, mean(before, squares, rule.beta2))
    }
    # Algorithm 2 of the paper: the limit of update t, counted from 0, is the fourth root of t.
    limit = (rates.count - 1) ** 0.25
    normalised = gradient / before.sqrt().clamp(min=rule.eps)
    normalised = torch.minimum(torch.maximum(normalised, -limit), limit)
    update = normalised * (1 - sum(moment.weight for moment in moments))
    for index, moment in enumerate(moments):
        name = first_moment(index)
        average = mean(elements.state[name], normalised, moment.beta)
        state[name] = torch.where(is_first, elements.state[name], average)
        update = update + moment.weight * average
    weights = rates.decayed(elements.weights) - rates.lr * update
    # Nothing is decayed either by the first update.
    return Elements(torch.where(is_first, elements.weights, weights), state)
