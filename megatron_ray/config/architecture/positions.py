"""Defines how rotary positions are scaled to longer sequences.

Must not know: how rotary angles are computed.
"""

from typing import Literal

from pydantic import Field

from megatron_ray.config.base import Config


class RopeScaling(Config):
    """Scaling of the rotary frequencies of a model trained on shorter sequences.

    Field names are those of Hugging Face.
    """

    kind: Literal["linear", "llama3", "yarn"]
    """`linear` divides all frequencies by the factor; `llama3` divides only those of
    long wavelengths, with a smooth step in between; `yarn` (Peng et al. 2023)
    interpolates by a ramp between divided and unchanged frequencies and sharpens
    attention."""
    factor: float = Field(ge=1)
    """Ratio of the new to the original sequence length."""
    original_max_position_embeddings: int = Field(default=8192, ge=1, le=1 << 40)
    """Sequence length of the original training, in tokens. Not used by `linear`."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """`llama3`: frequencies with wavelengths above original length / low_freq_factor are
    divided by the factor."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """`llama3`: frequencies with wavelengths below original length / high_freq_factor
    are unchanged. Must be above low_freq_factor."""
    beta_fast: float = Field(default=32.0, gt=0)
    """`yarn`: dimensions with more rotations than this over the original length are
    unchanged. Must be above beta_slow."""
    beta_slow: float = Field(default=1.0, gt=0)
    """`yarn`: dimensions with fewer rotations than this over the original length are
    divided by the factor."""
    mscale: float = Field(default=1.0, ge=0)
    """`yarn`: cos and sin are multiplied by m(mscale) / m(mscale_all_dim), where m(x) =
    0.1 x ln(factor) + 1."""
    mscale_all_dim: float = Field(default=0.0, ge=0)
    """`yarn`: with latent attention, attention scores are multiplied by the square of
    m(mscale_all_dim) (DeepSeek)."""
