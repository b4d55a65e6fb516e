"""Checks which steps and ranks are profiled.

Pure. Must not know: how many ranks there is room for.
"""

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig


def profile_problems(config: TrainConfig) -> list[Problem]:
    """Returns a problem of steps in `training.profile` that the run will not have."""
    profile = config.training.profile
    steps = config.training.known_steps
    if profile is None or steps is None or profile.first_and_last[1] <= steps:
        return []
    detail = f"steps={profile.steps} end after the run's last step, {steps}; profile earlier ones"
    return [Problem("/training/profile/steps", "beyond_the_run", detail)]


def profile_warnings(config: TrainConfig) -> list[Problem]:
    """Returns a warning of ranks in `training.profile` that the run does not have.

    It may have them at another size, to which an elastic job changes.
    """
    profile = config.training.profile
    parallel = config.parallel
    if profile is None or parallel.dp == "auto":
        return []
    num_ranks = parallel.tp * parallel.pp * parallel.cp * parallel.dp
    missing = [rank for rank in profile.ranks if rank >= num_ranks]
    if not missing:
        return []
    detail = (
        f"there is no rank {missing[0]}: the run has {num_ranks} ranks, numbered from 0; "
        "only the others are profiled"
    )
    return [Problem("/training/profile/ranks", "no_rank", detail)]
