"""What a config leaves open.

Owns: filling in what depends on the world and the tokenizer. Pure.
"""

from math import gcd, lcm

from megatron_ray.config.problem import ConfigError
from megatron_ray.config.train_config import TrainConfig


def resolve_dp(config: TrainConfig, max_world: int) -> int:
    """Dp for `auto`: the largest number of replicas that fits into `max_world` ranks,
    divides the batch and completes the experts' grid; the least that does where none of
    those fits.
    """
    parallel = config.parallel
    training = config.training
    if parallel.dp != "auto":
        return parallel.dp
    model = parallel.tp * parallel.pp * parallel.cp
    most = max(1, max_world // model)
    groups = training.global_batch_size // training.micro_batch_size
    step = least_dp(config)
    fitting = (dp for dp in range(most - most % step, 0, -step) if groups % dp == 0)
    return next(fitting, step if groups % step == 0 else 1)


def least_dp(config: TrainConfig) -> int:
    """Dp must be a multiple of this, so that experts and copies of sharded state can be
    dealt out over the replicas.
    """
    return lcm(expert_dp_multiple(config), _replica_dp_multiple(config))


def expert_dp_multiple(config: TrainConfig) -> int:
    """For etp x ep to divide tp x cp x dp."""
    parallel = config.parallel
    ranks = parallel.expert_tp * parallel.ep
    return ranks // gcd(ranks, parallel.tp * parallel.cp)


def _replica_dp_multiple(config: TrainConfig) -> int:
    """For zero_replicas to divide dp x cp."""
    return config.parallel.zero_replicas // gcd(
        config.parallel.zero_replicas, config.parallel.cp
    )


def resolve(config: TrainConfig, max_world: int) -> TrainConfig:
    """Fills what depends on the world: dp, and sequence parallelism (false at tp=1)."""
    parallel = config.parallel.model_copy(
        update={
            "dp": resolve_dp(config, max_world),
            "sequence_parallel": config.parallel.sequence_parallel
            and config.parallel.tp > 1,
        }
    )
    return config.model_copy(update={"parallel": parallel})


def with_vocabulary(config: TrainConfig, vocab_size: int) -> TrainConfig:
    """Fills model.vocab_size from the tokenizer.

    Raises ConfigError when the model's own is too small for it.
    """
    given = config.model.vocab_size
    if given is not None and given < vocab_size:
        raise ConfigError(
            f"model.vocab_size={given} is smaller than the tokenizer's {vocab_size}; raise "
            "it, or leave it out"
        )
    model = config.model.model_copy(update={"vocab_size": given or vocab_size})
    return config.model_copy(update={"model": model})


def world_size(config: TrainConfig) -> int:
    """Ranks of a resolved config."""
    parallel = config.parallel
    if parallel.dp == "auto":
        raise ValueError("parallel.dp is not resolved")
    return parallel.tp * parallel.pp * parallel.cp * parallel.dp
