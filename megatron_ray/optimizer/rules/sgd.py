"""Stochastic gradient descent with momentum, as torch.optim.SGD without dampening."""

from collections.abc import Mapping

from torch import Tensor

from megatron_ray.optimizer.rules.elements import Elements, Rates
from megatron_ray.optimizer.update_rule import UpdateRule


def sgd(elements: Elements, gradient: Tensor, rule: UpdateRule, rates: Rates) -> Elements:
    """Returns weights - lr x update, where the update has momentum."""
    update, state = with_momentum(elements.state, gradient, rule)
    return Elements(rates.decayed(elements.weights) - rates.lr * update, state)


def with_momentum(
    state: Mapping[str, Tensor], gradient: Tensor, rule: UpdateRule
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the update of a gradient by momentum, and the new state."""
    if rule.momentum == 0:
        return gradient, {}
    buffer = rule.momentum * state["momentum_buffer"] + gradient
    update = buffer
    if rule.nesterov:
        update = gradient + rule.momentum * buffer
    return update, {"momentum_buffer": buffer}
