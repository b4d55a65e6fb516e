"""Names the numbers of the optimizer monitor, and checks `callbacks.optimizer`.

Owns: which parameters are measured together. Pure. Must not know: how many ranks there
are, how a norm is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_ray.config.callbacks.monitors import OptimizerMonitorConfig
from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.config.optimizer_kinds import state_names, updates_matrices
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.sharding.parameters import freeze, name_matcher
from megatron_ray.validation.parameters.patterns import (
    ParameterNames,
    names_of,
    unmatched_patterns,
    whole_table,
)

MAX_NUMBERS = 2048
"""Numbers that all callbacks of a run report at most in one step: they are stored by
step."""
_POINTER = "/callbacks/optimizer"


@dataclass(frozen=True)
class MonitoredParameters:
    """The parameters that are measured, by scope."""

    scopes: dict[str, int] = field(default_factory=dict)
    """Index of each scope, in the order of the model."""
    scope_of: dict[str, int] = field(default_factory=dict)
    """Index of its scope by parameter."""
    states: dict[str, set[int]] = field(default_factory=dict)
    """Scopes that have a state of the optimizer, by its name."""

    def names(self, monitor: OptimizerMonitorConfig) -> list[tuple[str, str]]:
        """Returns every number's (metric, scope), in their order."""
        names = list[tuple[str, str]]()
        for metric in dict.fromkeys(monitor.metrics):
            if metric != "moment_norms":
                names += [(metric, scope) for scope in self.scopes]
                continue
            for state, indices in self.states.items():
                for scope, index in self.scopes.items():
                    if index in indices:
                        names.append((f"{state}_norm", scope))
        return names


def monitored_parameters(
    config: TrainConfig, monitor: OptimizerMonitorConfig
) -> MonitoredParameters:
    """Returns which parameters are measured together; the same on every rank."""
    optimizer = config.optimizer
    is_monitored = name_matcher(monitor.parameters)
    find_scope = _scopes(monitor.by, optimizer)
    of_matrices = updates_matrices(optimizer)
    monitored = MonitoredParameters()
    for local in freeze(whole_table(config), optimizer.freeze):
        if not local.trainable:
            continue
        for part in local.parts:
            name = part.logical.name
            if not is_monitored(name):
                continue
            scope = find_scope(name)
            index = monitored.scopes.setdefault(scope, len(monitored.scopes))
            monitored.scope_of[name] = index
            of_matrix = of_matrices and part.logical.is_matrix
            for state in state_names(optimizer, of_matrix=of_matrix):
                monitored.states.setdefault(state, set()).add(index)
    return monitored


def _scopes(by: str, optimizer: OptimizerConfig) -> Callable[[str], str]:
    """Returns the function from a parameter's name to that of its scope."""
    if by == "model":
        return lambda name: "model"
    if by == "layer":
        return _layer_of
    if by == "parameter":
        return lambda name: name
    matchers = [name_matcher(group.parameters) for group in optimizer.groups]
    return lambda name: _group_of(name, matchers)


def _layer_of(name: str) -> str:
    first, second, *_ = name.split(".")
    if first in ("layers", "mtp"):
        return f"{first}.{second}"
    return first


def _group_of(name: str, matchers: Sequence[Callable[[str], bool]]) -> str:
    # The last group that has a parameter determines its numbers.
    for index in reversed(range(len(matchers))):
        if matchers[index](name):
            return f"groups.{index}"
    return "others"


def monitor_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `callbacks.optimizer`.

    Every pattern must match a parameter, some must be trained, and the numbers of a step
    are limited.
    """
    monitor = config.callbacks.optimizer
    if monitor is None:
        return []
    pointer = f"{_POINTER}/parameters"
    names = ParameterNames(names_of(whole_table(config)))
    problems = unmatched_patterns(names, monitor.parameters, pointer)
    if problems:
        return problems
    monitored = monitored_parameters(config, monitor)
    if not monitored.scopes:
        detail = (
            "all parameters that are measured are frozen by optimizer.freeze; name others, "
            "or leave the monitor out"
        )
        return [Problem(pointer, "nothing_monitored", detail)]
    num_numbers = len(monitored.names(monitor))
    if num_numbers <= MAX_NUMBERS:
        return []
    detail = (
        f"by={monitor.by} has {len(monitored.scopes)} scopes and {num_numbers} numbers a "
        f"step, at most {MAX_NUMBERS} are possible; use by=layer, fewer metrics, or fewer "
        'parameters, such as ["layers.0.*"]'
    )
    return [Problem(f"{_POINTER}/by", "too_many_numbers", detail)]
