"""Allocates the caches of keys and values, and bounds their length.

Owns: how many tokens fit, by positions and by memory.
"""

from megatron_ray.distributed.device import free_memory_bytes
from megatron_ray.models.attention import KeyValueCache
from megatron_ray.models.gpt import GPT

_CACHE_SHARE = 0.9
"""Share of the free memory that keys and values may take."""


def check_length(model: GPT, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises ValueError for more tokens than learned positions or than fit into memory."""
    limit = None
    capacity = ""
    rest = ""
    if model.config.position_embedding == "learned":
        limit = model.config.max_sequence_length
        capacity = f"the model has learned {limit} positions"
        rest = "positions that the model has learned"
    fitting = _tokens_in_memory(model)
    if fitting is not None and (limit is None or fitting < limit):
        limit = fitting
        capacity = f"the free memory has room for {limit}"
        rest = "tokens that the free memory has room for"
    if limit is None or prompt_tokens + max_new_tokens <= limit:
        return
    if prompt_tokens >= limit:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens, {capacity}; shorten the prompt"
        )
    raise ValueError(
        f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones need more than the "
        f"{limit} {rest}; ask for at most {limit - prompt_tokens} new tokens"
    )


def _tokens_in_memory(model: GPT) -> int | None:
    """Returns how many tokens the caches can hold; None where free memory is unknown."""
    like = next(model.parameters())
    free_bytes = free_memory_bytes(like.device)
    if free_bytes is None:
        return None
    config = model.config
    width = 2 * config.num_layers * config.kv_heads * config.head_width
    return int(free_bytes * _CACHE_SHARE) // (width * like.element_size())


def empty_caches(model: GPT, capacity: int) -> list[KeyValueCache]:
    """Returns a cache for each layer, of `capacity` tokens."""
    config = model.config
    like = next(model.parameters())
    shape = (1, config.kv_heads, capacity, config.head_width)
    caches = list[KeyValueCache]()
    for _ in range(config.num_layers):
        caches.append(KeyValueCache(like.new_zeros(shape), like.new_zeros(shape)))
    return caches
