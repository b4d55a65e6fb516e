"""Defines DeepSeek's additions to a GPT: latent attention and multi-token prediction.

Owns: architecture only. Must not know: parallelism, devices.
"""

from pydantic import Field

from megatron_ray.config.base import Config


class LatentAttentionConfig(Config):
    """Multi-head latent attention (MLA, DeepSeek-V2).

    Queries, and keys together with values, are projected through low-rank latents. Only
    a small part of each head's query and key is rotated, and all heads share the
    rotated part of the key. Defaults are those of DeepSeek-V3.
    """

    q_lora_rank: int | None = Field(default=1536, ge=8, le=65536)
    """Width of the latent of queries; null projects queries directly from the hidden
    state (DeepSeek-V2-Lite)."""
    kv_lora_rank: int = Field(default=512, ge=8, le=65536)
    """Width of the latent that keys and values share."""
    qk_nope_head_dim: int = Field(default=128, ge=2, le=1024)
    """Width of the part of a head's query and key that is not rotated."""
    qk_rope_head_dim: int = Field(default=64, ge=2, le=1024, multiple_of=2)
    """Width of the part of a head's query and key that rotary positions rotate."""
    v_head_dim: int = Field(default=128, ge=2, le=1024)
    """Width of a head's value; at most the width of its query and key."""
    norm_eps: float = Field(default=1e-6, gt=0, le=0.1)
    """Added to the variance inside the norms of the latents. Published models have 1e-6
    there, whatever the model's norm_eps is."""

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key: the unrotated and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


class MultiTokenPredictionConfig(Config):
    """Multi-token prediction (MTP, DeepSeek-V3 section 2.2).

    Each MTP layer stands behind the last transformer block and predicts one token
    later than the one before it.
    """

    num_layers: int = Field(default=1, ge=1, le=16)
    """Number of MTP layers, each of which predicts one more token beyond the next."""
    loss_coeff: float = Field(default=0.1, ge=0)
    """Weight of the mean loss of the MTP layers, whose gradient is added to that of the
    next-token loss. Above 0 each layer's loss is reported separately, as
    `mtp_<n>_loss`."""

    @property
    def weight(self) -> float:
        """Weight of the loss of each single MTP layer."""
        return self.loss_coeff / self.num_layers
