"""The small reference model of the throughput bench: its weights (by Hugging Face name)
and its tokens, from fixed seeds, and the losses that several independent libraries
agreed on for them.
"""

import numpy as np
import torch
from torch import Tensor

LAYERS = 4
HIDDEN = 256
HEADS = 4
FFN = 768
SEQUENCE = 256
VOCABULARY = 8192
SEED = 1234
MICRO_BATCH = 4
GLOBAL_BATCH = 8
LEARNING_RATE = 3e-4

LOSSES = [
    9.065484,
    8.981487,
    8.884339,
    8.783581,
    8.783063,
    8.700512,
    8.563730,
    8.628614,
    8.528987,
    8.534986,
    8.528761,
    8.446885,
]
"""fp32, first 12 steps."""

GRAD_NORMS = [
    1.859028,
    1.630037,
    1.935623,
    1.413432,
    1.234665,
    1.195038,
    1.200797,
    1.114195,
    1.028048,
    0.961588,
    0.953974,
    1.025549,
]
"""Norms of the gradients of transformers in fp32, added up in fp64: a norm added up in
fp32 is off by up to 1.8e-4 here."""


def weights() -> dict[str, Tensor]:
    """Normal(0, 0.02) matrices drawn in this order from one generator; norms are ones."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.empty(*shape).normal_(0.0, 0.02, generator=generator)

    state = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            state[f"{prefix}self_attn.{name}_proj.weight"] = normal(HIDDEN, HIDDEN)
        state[prefix + "mlp.gate_proj.weight"] = normal(FFN, HIDDEN)
        state[prefix + "mlp.up_proj.weight"] = normal(FFN, HIDDEN)
        state[prefix + "mlp.down_proj.weight"] = normal(HIDDEN, FFN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN)
    state["model.norm.weight"] = torch.ones(HIDDEN)
    state["lm_head.weight"] = normal(VOCABULARY, HIDDEN)
    return state


def samples(step: int) -> np.ndarray:
    """[GLOBAL_BATCH, SEQUENCE + 1] tokens of step `step` (from 0): Zipf draws, three of
    four replaced by their bigram's successor.
    """
    successor = np.random.default_rng(SEED).permutation(VOCABULARY)
    share = 1.0 / np.arange(1, VOCABULARY + 1)
    rng = np.random.default_rng((SEED, 7, step))
    shape = (GLOBAL_BATCH, SEQUENCE + 1)
    drawn = np.minimum(
        np.searchsorted(np.cumsum(share / share.sum()), rng.random(shape)), VOCABULARY - 1
    )
    follow = rng.random(shape) < 0.75
    tokens = np.empty(shape, dtype=np.int64)
    tokens[:, 0] = drawn[:, 0]
    for position in range(1, SEQUENCE + 1):
        tokens[:, position] = np.where(
            follow[:, position], successor[tokens[:, position - 1]], drawn[:, position]
        )
    return tokens
