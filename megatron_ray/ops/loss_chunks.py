"""Chooses how many tokens the loss processes at once.

Torch-free, since planning uses it too.
"""

# fp32 logits processed at once: a share of the last-level cache on CPU; enough for full
# utilisation on CUDA.
_CHUNK_ELEMENTS = {"cpu": 1024 * 1024, "cuda": 64 * 1024 * 1024}


def rows_at_once(device: str, vocabulary: int) -> int:
    """Returns how many tokens' logits are processed together, at least one.

    `vocabulary`: this rank's rows of it.
    """
    elements = _CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS["cuda"])
    return max(1, elements // vocabulary)
