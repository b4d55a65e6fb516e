"""Checks how main parameters are to be kept.

Pure. Must not know: how they are restored.
"""

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig

_POINTER = "/optimizer/store_param_remainders"


def remainder_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of weights that have no remainders of 16 bits."""
    if not config.optimizer.store_param_remainders:
        return []
    problems = []
    precision = config.training.precision
    if precision != "bf16":
        detail = (
            "a bf16 weight and its remainder are an fp32 number, and with "
            f"precision={precision} there are no bf16 weights; set precision to bf16, or leave "
            "store_param_remainders out"
        )
        problems.append(Problem(_POINTER, "remainders_of_bf16", detail))
    if config.parallel.zero == 3:
        detail = (
            "with zero=3 the sharded weights are fp32, so nothing is kept beside them; use "
            "zero=1, or leave store_param_remainders out"
        )
        problems.append(Problem(_POINTER, "remainders_of_bf16", detail))
    return problems
