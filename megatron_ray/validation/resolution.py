"""Resolves open values of a config: data-parallel size, number of steps, vocabulary.

Pure: the world size, the tokenizer's size and the data's are arguments.
"""

from math import gcd, lcm

from megatron_ray.config.problem import ConfigError
from megatron_ray.config.train_config import TrainConfig


def resolve_dp(config: TrainConfig, max_world: int) -> int:
    """Returns the data-parallel size, where `auto` depends on `max_world` ranks.

    It is the largest dp that fits, divides the batch and completes the expert grid. If
    none fits, it is the smallest that meets the other conditions, so that the caller
    can report how many ranks are missing.
    """
    parallel = config.parallel
    training = config.training
    if parallel.dp != "auto":
        return parallel.dp
    ranks_per_replica = parallel.tp * parallel.pp * parallel.cp
    most = max(1, max_world // ranks_per_replica)
    microbatches = training.batch_sizes.divisor // training.micro_batch_size
    step = least_dp(config)
    # Tries the most replicas first, which are the fastest.
    for dp in range(most - most % step, 0, -step):
        if microbatches % dp == 0:
            return dp
    if microbatches % step == 0:
        return step
    return 1


def least_dp(config: TrainConfig) -> int:
    """Returns the number of which dp must be a multiple.

    Only then can experts, and copies of sharded state, be spread evenly over the replicas
    of each group.
    """
    of_group = lcm(expert_dp_multiple(config), _replica_dp_multiple(config))
    return of_group * config.parallel.replica_groups


def expert_dp_multiple(config: TrainConfig) -> int:
    """Returns the number that must divide dp so that etp x ep divides tp x cp x dp.

    With replica groups dp is that of one group.
    """
    parallel = config.parallel
    ranks = parallel.expert_tp * parallel.ep
    return ranks // gcd(ranks, parallel.tp * parallel.cp)


def _replica_dp_multiple(config: TrainConfig) -> int:
    """Returns the number that must divide dp so that zero_replicas divides dp x cp."""
    replicas = config.parallel.zero_replicas
    return replicas // gcd(replicas, config.parallel.cp)


def resolve(config: TrainConfig, max_world: int) -> TrainConfig:
    """Fills in dp and the steps of a number of tokens.

    Turns sequence parallelism off at tp=1.
    """
    parallel = config.parallel
    # Sequence parallelism over one rank splits nothing; the layers rely on it being off.
    resolved = parallel.model_copy(
        update={
            "dp": resolve_dp(config, max_world),
            "sequence_parallel": parallel.sequence_parallel and parallel.tp > 1,
        }
    )
    resolved_config = config.model_copy(update={"parallel": resolved})
    steps = config.training.known_steps
    if steps is None:
        return resolved_config
    return _with_steps(resolved_config, steps)


def with_length(config: TrainConfig, num_tokens: int) -> TrainConfig:
    """Fills in the steps of a number of epochs over training data of `num_tokens`."""
    return _with_steps(config, config.training.steps_over(num_tokens))


def _with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    update = {"steps": steps, "epochs": None, "tokens": None}
    training = config.training.model_copy(update=update)
    return config.model_copy(update={"training": training})


def with_vocabulary(
    config: TrainConfig, vocab_size: int, rows: int | None = None
) -> TrainConfig:
    """Fills in model.vocab_size from the tokenizer's size.

    `rows` is the smallest vocabulary that the data need, by default `vocab_size`. Raises
    ConfigError when the model has fewer tokens.
    """
    needed = rows or vocab_size
    own_size = config.model.vocab_size
    if own_size is not None and own_size < needed:
        remedy = "raise it, or leave it out"
        if config.checkpoint.start_from is not None:
            remedy = f"set it to {needed} or more: rows that the weights lack are added"
        raise ConfigError(
            f"model.vocab_size={own_size} is smaller than the tokenizer's {needed}; {remedy}"
        )
    model = config.model.model_copy(update={"vocab_size": own_size or vocab_size})
    return config.model_copy(update={"model": model})


def world_size(config: TrainConfig) -> int:
    """Returns the number of ranks. Raises ValueError while dp is `auto`."""
    parallel = config.parallel
    if parallel.dp == "auto":
        raise ValueError("parallel.dp is not resolved")
    return parallel.tp * parallel.pp * parallel.cp * parallel.dp
