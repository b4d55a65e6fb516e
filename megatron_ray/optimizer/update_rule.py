"""Determines the numbers with which each parameter is updated.

Owns: which of `optimizer.groups` applies to a parameter. Pure; torch-free. Must not know:
buffers, the arithmetic of the update.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.config.optimizer_kinds import updates_matrices
from megatron_ray.sharding.parameter_types import (
    NO_FACTORS,
    LogicalParameter,
    RateFactors,
)
from megatron_ray.sharding.parameters import name_matcher


class Moment(NamedTuple):
    """One of several first moments."""

    beta: float
    weight: float
    """Its share of the update."""


@dataclass(frozen=True)
class UpdateRule:
    """The numbers of an update; parameters with equal ones are updated together.

    Those that the optimizer does not use are 0, and `nu` is 1.
    """

    weight_decay: float
    lr_scale: float = 1.0
    """Factor on the learning rate of the schedule."""
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    nu: float = 1.0
    """Share of the first moment in an update."""
    aggregated: tuple[Moment, ...] = ()
    decay: str = "lr"
    """`lr`, `schedule` or `l2`, see `OptimizerConfig.decay`."""
    of_matrix: bool = False
    """Whether the parameter is a matrix that is updated as a whole."""
    fixed: frozenset[str] = frozenset()
    """Those of the run's varying numbers that do not vary here."""
    rates: RateFactors = NO_FACTORS
    """The factors of muP, which the numbers above have already."""

    def with_numbers(self, numbers: Mapping[str, float]) -> Self:
        """Returns the rule with other numbers, except for those that are fixed."""
        changes: dict[str, Any] = {}
        for name, value in numbers.items():
            if name not in self.fixed:
                changes[name] = value * self._factor(name)
        return replace(self, **changes)

    def with_factors(self, rates: RateFactors) -> Self:
        """Returns the rule with the factors of muP, of which all are 1 without it."""
        rule = replace(self, rates=rates, lr_scale=self.lr_scale * rates.lr)
        numbers = {}
        for name in ("weight_decay", "eps"):
            numbers[name] = getattr(self, name) * rule._factor(name)
        return replace(rule, **numbers)

    def _factor(self, name: str) -> float:
        """Returns muP's factor on one of the numbers."""
        if name == "eps":
            return self.rates.eps
        if name == "weight_decay" and self.decay == "lr":
            return self.rates.decay
        return 1.0

    @classmethod
    def of(cls, config: OptimizerConfig) -> Self:
        """Returns the numbers of the optimizer, without its groups."""
        moments = []
        for moment in config.aggregated or ():
            moments.append(Moment(moment.beta, moment.weight))
        nu = 1.0
        if config.nu is not None:
            nu = config.nu
        return cls(
            config.weight_decay,
            beta1=config.beta1 or 0.0,
            beta2=config.beta2 or 0.0,
            eps=config.eps or 0.0,
            momentum=config.momentum or 0.0,
            nesterov=config.nesterov or False,
            nu=nu,
            aggregated=tuple(moments),
            decay=config.decay or "lr",
        )

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The first moments of an update."""
        return self.aggregated or (Moment(self.beta1, self.nu),)


class UpdateRules:
    """The rules of all parameters: the optimizer's, changed by the groups they are in."""

    def __init__(self, config: OptimizerConfig) -> None:
        self._rule = UpdateRule.of(config)
        self._varying = config.varying_numbers
        self._updates_matrices = updates_matrices(config)
        self._adamw_lr_scale = config.adamw_lr_scale or 1.0
        self._groups: list[tuple[Callable[[str], bool], dict[str, Any]]] = []
        for group in config.groups:
            numbers = group.model_dump(exclude={"parameters"}, exclude_none=True)
            self._groups.append((name_matcher(group.parameters), numbers))

    def of(self, parameter: LogicalParameter) -> UpdateRule:
        """Returns the rule of one parameter."""
        rule = self._rule
        own = set[str]()
        if not parameter.decay:
            rule = replace(rule, weight_decay=0.0)
            own.add("weight_decay")
        if self._updates_matrices and parameter.is_matrix:
            rule = replace(rule, of_matrix=True)
        else:
            rule = replace(rule, lr_scale=self._adamw_lr_scale)
        # Later groups override earlier ones, number by number.
        for is_member, numbers in self._groups:
            if is_member(parameter.name):
                rule = replace(rule, **numbers)
                own.update(numbers)
        rule = replace(rule, fixed=self._varying & own)
        return rule.with_factors(parameter.rates)
