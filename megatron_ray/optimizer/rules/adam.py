"""AdamW, its quasi-hyperbolic form, and its form with several first moments.

AdamW: Loshchilov and Hutter 2019. QHAdamW: Ma and Yarats 2018 (nu2 = 1). Aggregated
momentum: Lucas et al. 2018, here as weighted averages.
"""

from torch import Tensor

from megatron_ray.config.optimizer_kinds import first_moment
from megatron_ray.optimizer.rules.elements import Elements, Rates, mean
from megatron_ray.optimizer.update_rule import UpdateRule


def adamw(elements: Elements, gradient: Tensor, rule: UpdateRule, rates: Rates) -> Elements:
    """Returns weights - lr x m / (sqrt(v) + eps), with bias-corrected moments.

    m is the weighted sum of the first moments, and of the gradient for what they lack to 1.
    """
    second = mean(elements.state["exp_avg_sq"], gradient * gradient, rule.beta2)
    state = {"exp_avg_sq": second}
    update = gradient * (1 - sum(moment.weight for moment in rule.moments))
    for index, moment in enumerate(rule.moments):
        name = first_moment(index)
        state[name] = mean(elements.state[name], gradient, moment.beta)
        update = update + state[name] * (moment.weight / (1 - moment.beta**rates.count))
    scale = (second / (1 - rule.beta2**rates.count)).sqrt() + rule.eps
    return Elements(rates.decayed(elements.weights) - rates.lr * update / scale, state)
