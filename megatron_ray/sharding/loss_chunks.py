"""How many tokens the loss looks at in one go.

Owns: that number, which planning counts with too. Torch-free.
"""

# fp32 logits worked on at a time: a share of the last-level cache on CPU; enough to
# fill the machine on CUDA.
_CHUNK_ELEMENTS = {"cpu": 1024 * 1024, "cuda": 64 * 1024 * 1024}


def rows_at_once(device: str, vocabulary: int) -> int:
    """Tokens whose logits over this rank's `vocabulary` rows are worked on together; at
    least one.
    """
    return max(1, _CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS["cuda"]) // vocabulary)
