"""Computes the sizes of a microbatch on one rank, shared by all estimates.

Pure. Must not know: torch, layers.
"""

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.sharding.parameters import padded_vocabulary

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def width_of(config: TrainConfig) -> int:
    """Returns the bytes of an activation, and of a weight as products read it."""
    return _BYTES[config.training.precision]


def hidden_width_of(config: TrainConfig) -> int:
    """Returns the bytes of an element of the hidden states between layers."""
    if config.training.fp32_residual_connection:
        return _BYTES["fp32"]
    return width_of(config)


def grad_width_of(config: TrainConfig) -> int:
    """Returns the bytes of a gradient as it is reduced."""
    return _BYTES[config.training.grad_precision]


def tokens_of(config: TrainConfig) -> int:
    """Returns the tokens of a microbatch on a context-parallel rank."""
    training = config.training
    return training.seq_length * training.micro_batch_size // config.parallel.cp


def own_tokens_of(config: TrainConfig) -> int:
    """Returns the tokens whose hidden states a rank keeps.

    With sequence parallelism those are its part of `tokens_of`, without it all of them.
    """
    if config.parallel.sequence_parallel:
        return tokens_of(config) // config.parallel.tp
    return tokens_of(config)


def local_vocabulary(config: TrainConfig) -> int:
    """Returns the rows of embedding and output head on a rank, padding included."""
    return padded_vocabulary(config.model, config.parallel.tp) // config.parallel.tp


def num_microbatches(config: TrainConfig) -> int:
    """Returns the microbatches of a step of the full batch on each rank.

    Raises ValueError while dp is not resolved.
    """
    return max(1, config.training.global_batch_size // _samples(config))


def all_num_microbatches(config: TrainConfig) -> tuple[int, ...]:
    """Returns the microbatches of steps of each batch size.

    Raises ValueError while dp is not resolved.
    """
    sizes = config.training.batch_sizes.sizes
    return tuple(max(1, size // _samples(config)) for size in sizes)


def _samples(config: TrainConfig) -> int:
    """Returns the samples of a microbatch over all replicas."""
    if config.parallel.dp == "auto":
        raise ValueError("parallel.dp is not resolved")
    return config.training.micro_batch_size * config.parallel.dp
