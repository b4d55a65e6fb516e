"""AdamW, its quasi-hyperbolic form, and its form with several first moments.

AdamW: Loshchilov and Hutter 2019. QHAdamW: Ma and Yarats 2018 (nu2 = 1). Aggregated
momentum: Lucas et al. 2018, here as weighted averages.
"""

from collections.abc import Sequence

from torch import Tensor

from megatron_ray.config.optimizer_kinds import first_moment
from megatron_ray.optimizer.rules.elements import Elements, Rates, mean
from megatron_ray.optimizer.update_rule import Moment, UpdateRule


def adamw(elements: Elements, gradient: Tensor, rule: UpdateRule, rates: Rates) -> Elements:
    """Returns weights - lr x m / (sqrt(v) + eps), with bias-corrected moments."""
    return _update(elements, gradient, rule, rates, [Moment(rule.beta1, 1.0)])


def qhadamw(
    elements: Elements, gradient: Tensor, rule: UpdateRule, rates: Rates
) -> Elements:
    """As AdamW, with (1 - nu) x gradient + nu x m instead of m."""
    return _update(elements, gradient, rule, rates, [Moment(rule.beta1, rule.nu)])


def aggmo_adamw(
    elements: Elements, gradient: Tensor, rule: UpdateRule, rates: Rates
) -> Elements:
    """As QHAdamW, with several first moments."""
    return _update(elements, gradient, rule, rates, rule.aggregated)


def _update(
    elements: Elements,
    gradient: Tensor,
    rule: UpdateRule,
    rates: Rates,
    moments: Sequence[Moment],
) -> Elements:
    second = mean(elements.state["exp_avg_sq"], gradient * gradient, rule.beta2)
    state = {"exp_avg_sq": second}
    update = gradient * (1 - sum(moment.weight for moment in moments))
    for index, moment in enumerate(moments):
        name = first_moment(index)
        state[name] = mean(elements.state[name], gradient, moment.beta)
        update = update + state[name] * (moment.weight / (1 - moment.beta**rates.count))
    scale = (second / (1 - rule.beta2**rates.count)).sqrt() + rule.eps
    return Elements(rates.decayed(elements.weights) - rates.lr * update / scale, state)
