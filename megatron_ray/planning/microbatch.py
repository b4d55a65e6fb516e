"""Sizes of a microbatch on one rank, of which bytes, sends and work are multiples.

Owns: these few. Pure. Must not know: torch, layers.
"""

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.sharding.parameters import padded_vocabulary

_WIDTHS = {"fp32": 4, "bf16": 2}


def width_of(config: TrainConfig) -> int:
    """Bytes of an activation, and of a weight as products read it."""
    return _WIDTHS[config.training.precision]


def tokens_of(config: TrainConfig) -> int:
    """Tokens of a microbatch on a context-parallel rank."""
    return (
        config.training.seq_length * config.training.micro_batch_size // config.parallel.cp
    )


def own_tokens_of(config: TrainConfig) -> int:
    """Those whose hidden states this rank keeps: a part of them under sequence
    parallelism.
    """
    return tokens_of(config) // (
        config.parallel.tp if config.parallel.sequence_parallel else 1
    )


def local_vocabulary(config: TrainConfig) -> int:
    """Rows of the embedding and of the head on a rank, padding included."""
    return padded_vocabulary(config.model, config.parallel.tp) // config.parallel.tp


def num_microbatches(config: TrainConfig) -> int:
    """Of a step, on each rank. Raises ValueError while dp is not resolved."""
    if config.parallel.dp == "auto":
        raise ValueError("parallel.dp is not resolved")
    return max(
        1,
        config.training.global_batch_size
        // (config.training.micro_batch_size * config.parallel.dp),
    )
