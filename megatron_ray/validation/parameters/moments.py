"""Checks moments that are kept in a short type.

Pure. Must not know: the arithmetic of an optimizer.
"""

from collections.abc import Iterator

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig

_LARGEST_RATE = 0.99
"""Largest decay rate of a moment in bf16. Its numbers are up to 0.8 % apart, and a moment
that changes by less than half of that is rounded to what it was."""


def moment_problems(config: TrainConfig) -> list[Problem]:
    """Returns decay rates with which a moment in bf16 would hardly change."""
    optimizer = config.optimizer
    problems = []
    if optimizer.exp_avg_dtype == "bf16":
        problems += _problems("exp_avg_dtype", _rates_of_first_moments(optimizer))
    if optimizer.exp_avg_sq_dtype == "bf16":
        problems += _problems("exp_avg_sq_dtype", _rates(optimizer, "beta2"))
    return problems


def _rates_of_first_moments(optimizer: OptimizerConfig) -> Iterator[tuple[str, float]]:
    yield from _rates(optimizer, "beta1")
    yield from _rates(optimizer, "momentum")
    for index, moment in enumerate(optimizer.aggregated or ()):
        yield f"aggregated/{index}/beta", moment.beta


def _rates(optimizer: OptimizerConfig, name: str) -> Iterator[tuple[str, float]]:
    """Yields a number wherever it is set, with its field."""
    value = getattr(optimizer, name)
    if value is not None:
        yield name, value
    for section in ("groups", "switches"):
        for index, other in enumerate(getattr(optimizer, section)):
            value = getattr(other, name, None)
            if value is not None:
                yield f"{section}/{index}/{name}", value


def _problems(dtype_field: str, rates: Iterator[tuple[str, float]]) -> list[Problem]:
    problems = []
    for field, rate in rates:
        if rate <= _LARGEST_RATE:
            continue
        detail = (
            f"{field.rpartition('/')[2]}={rate:g} changes a moment by {1 - rate:.2g} of itself "
            f"in a step, which bf16 rounds away; make it at most {_LARGEST_RATE}, or leave "
            f"{dtype_field} out"
        )
        problems.append(Problem(f"/optimizer/{field}", "moment_is_rounded_away", detail))
    return problems
