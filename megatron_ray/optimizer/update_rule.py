"""Determines the numbers with which each parameter is updated.

Owns: which of `optimizer.groups` applies to a parameter. Pure; torch-free. Must not know:
buffers, the arithmetic of the update.
"""

from dataclasses import dataclass, replace

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.sharding.parameter_types import LogicalParameter
from megatron_ray.sharding.parameters import matches


@dataclass(frozen=True)
class UpdateRule:
    """The numbers of an AdamW update; parameters with equal ones are updated together."""

    weight_decay: float
    lr_scale: float
    """Factor on the learning rate of the schedule."""
    beta1: float
    beta2: float
    eps: float


def update_rule(parameter: LogicalParameter, config: OptimizerConfig) -> UpdateRule:
    """Returns the rule of a parameter: the optimizer's, changed by the groups it is in."""
    weight_decay = 0.0
    if parameter.decay:
        weight_decay = config.weight_decay
    rule = UpdateRule(weight_decay, 1.0, config.beta1, config.beta2, config.eps)
    # Later groups override earlier ones, number by number.
    for group in config.groups:
        if matches(parameter.name, group.parameters):
            numbers = group.model_dump(exclude={"parameters"}, exclude_none=True)
            rule = replace(rule, **numbers)
    return rule
