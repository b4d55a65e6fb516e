"""Stochastic gradient descent with momentum, as torch.optim.SGD without dampening."""

from torch import Tensor

from megatron_ray.optimizer.rules.elements import Elements, Rates
from megatron_ray.optimizer.update_rule import UpdateRule


def sgd(elements: Elements, gradient: Tensor, rule: UpdateRule, rates: Rates) -> Elements:
    """Returns weights - lr x update, where the update has momentum."""
    state = {}
    update = gradient
    if rule.momentum > 0:
        buffer = rule.momentum * elements.state["momentum_buffer"] + gradient
        state["momentum_buffer"] = buffer
        update = buffer
        if rule.nesterov:
            update = gradient + rule.momentum * buffer
    return Elements(rates.decayed(elements.weights) - rates.lr * update, state)
