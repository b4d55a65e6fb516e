"""Shape of DeepSeek's additions to a GPT: latent attention and the prediction of
several tokens.

Owns: architecture only.

Must not know: parallelism, devices.
"""

from pydantic import Field

from megatron_ray.config.base import Config


class LatentAttentionConfig(Config):
    """Multi-head latent attention (DeepSeek-V2): queries, and keys with values, go
    through low-rank latents; only a small part of each head's key is rotated, and that
    part is shared by all heads. Defaults are DeepSeek-V3's.
    """

    q_lora_rank: int | None = Field(default=1536, ge=8, le=65536)
    """Width of the latent of queries; null projects them directly."""
    kv_lora_rank: int = Field(default=512, ge=8, le=65536)
    """Width of the latent of keys and values."""
    qk_nope_head_dim: int = Field(default=128, ge=2, le=1024)
    """Part of a head's query and key without positions."""
    qk_rope_head_dim: int = Field(default=64, ge=2, le=1024, multiple_of=2)
    """Rotated part of a head's query and key."""
    v_head_dim: int = Field(default=128, ge=2, le=1024)
    """Width of a head's value."""

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


class MultiTokenPredictionConfig(Config):
    """Further layers behind the last one, each of which predicts one token more into
    the future (DeepSeek-V3, section 2.2).
    """

    num_layers: int = Field(default=1, ge=1, le=16)
    """Tokens predicted beyond the next one."""
    loss_coeff: float = Field(default=0.1, ge=0)
    """Weight of their mean loss beside the next token's. Its gradient is added; above 0
    each is reported apart from the loss."""

    @property
    def weight(self) -> float:
        """Of each one's loss."""
        return self.loss_coeff / self.num_layers
