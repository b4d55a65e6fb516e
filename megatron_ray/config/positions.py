"""How rotary angles are stretched to longer sequences.

Owns: the settings. Must not know: how they are computed.
"""

from typing import Literal

from pydantic import Field

from megatron_ray.config.base import Config


class RopeScaling(Config):
    """Changes the rotary frequencies of a model trained on shorter sequences, as its
    authors did.

    Names are Hugging Face's.
    """

    kind: Literal["linear", "llama3", "yarn"]
    """`linear` divides all positions by the factor; `llama3` only those of long
    wavelengths, with a smooth step between; `yarn` (Peng et al. 2023) interpolates
    between both by a ramp and makes attention sharper."""
    factor: float = Field(ge=1)
    """How many times longer sequences become."""
    original_max_position_embeddings: int = Field(default=8192, ge=1)
    """Sequence length that the model was trained for (not used by `linear`)."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """`llama3`: wavelengths above original length / this are divided by the factor."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """`llama3`: wavelengths below original length / this stay as they are."""
    beta_fast: float = Field(default=32.0, gt=0)
    """`yarn`: dimensions with more rotations than this over the original length stay as
    they are."""
    beta_slow: float = Field(default=1.0, gt=0)
    """`yarn`: dimensions with fewer rotations than this are divided by the factor."""
    mscale: float = Field(default=1.0, ge=0)
    """`yarn`: cos and sin are multiplied by m(mscale) / m(mscale_all_dim), where m(x) =
    0.1 x ln(factor) + 1."""
    mscale_all_dim: float = Field(default=0.0, ge=0)
    """`yarn`: under latent attention, attention scores are multiplied by
    m(mscale_all_dim) squared (DeepSeek)."""
