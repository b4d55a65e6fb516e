"""ADOPT (Taniguchi et al. 2024), its quasi-hyperbolic form, and with several first moments.

The gradient is divided by the second moment of the updates before it, and clipped; there is
no bias correction. The first update only sets the second moment.
"""

import torch
from torch import Tensor

from megatron_ray.config.optimizer_kinds import first_moment
from megatron_ray.optimizer.rules.elements import Elements, Rates, mean
from megatron_ray.optimizer.update_rule import UpdateRule


def adopt(elements: Elements, gradient: Tensor, rule: UpdateRule, rates: Rates) -> Elements:
    """Returns weights - lr x m, where m averages normalised gradients.

    m is the weighted sum of the first moments, and of the normalised gradient for what they
    lack to 1.
    """
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
    update = normalised * (1 - sum(moment.weight for moment in rule.moments))
    for index, moment in enumerate(rule.moments):
        name = first_moment(index)
        average = mean(elements.state[name], normalised, moment.beta)
        state[name] = torch.where(is_first, elements.state[name], average)
        update = update + moment.weight * average
    weights = rates.decayed(elements.weights) - rates.lr * update
    # Nothing is decayed either by the first update.
    return Elements(torch.where(is_first, elements.weights, weights), state)
