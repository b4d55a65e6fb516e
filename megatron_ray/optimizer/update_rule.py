"""Determines the numbers with which each parameter is updated.

Owns: which of `optimizer.groups` applies to a parameter. Pure; torch-free. Must not know:
buffers, the arithmetic of the update.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.sharding.parameter_types import LogicalParameter
from megatron_ray.sharding.parameters import name_matcher


@dataclass(frozen=True)
class UpdateRule:
    """The numbers of an AdamW update; parameters with equal ones are updated together."""

    weight_decay: float
    lr_scale: float
    """Factor on the learning rate of the schedule."""
    beta1: float
    beta2: float
    eps: float


class UpdateRules:
    """The rules of all parameters: the optimizer's, changed by the groups they are in."""

    def __init__(self, config: OptimizerConfig) -> None:
        self._config = config
        self._groups: list[tuple[Callable[[str], bool], dict[str, float]]] = []
        for group in config.groups:
            numbers = group.model_dump(exclude={"parameters"}, exclude_none=True)
            self._groups.append((name_matcher(group.parameters), numbers))

    def of(self, parameter: LogicalParameter) -> UpdateRule:
        """Returns the rule of one parameter."""
        config = self._config
        weight_decay = 0.0
        if parameter.decay:
            weight_decay = config.weight_decay
        rule = UpdateRule(weight_decay, 1.0, config.beta1, config.beta2, config.eps)
        # Later groups override earlier ones, number by number.
        for is_member, numbers in self._groups:
            if is_member(parameter.name):
                rule = replace(rule, **numbers)
        return rule
