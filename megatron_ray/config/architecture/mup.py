"""Defines the maximal update parametrization (muP) and its depth form, CompleteP.

Owns: the multipliers of a model whose width and depth are multiples of a base model's.
Must not know: parameters, devices.
"""

from pydantic import Field

from megatron_ray.config.base import Config


class MuPConfig(Config):
    """Initial values and learning rates with which a base model's numbers fit larger ones.

    With n = hidden_size / base_hidden_size and Adam's kind of optimizer, matrices of the
    blocks start smaller by sqrt(n) and learn slower by n, and logits are divided by n (Yang
    and others, Tensor Programs V, table 8). With l = num_layers / base_num_layers and
    a = depth_alpha, outputs of attention and MLP are divided by l^a, and rates of the blocks
    multiplied by l^(a - 1) (Dey and others, CompleteP). A larger model has more heads of the
    same width, and an MLP as much wider.
    """

    base_hidden_size: int = Field(ge=8, le=65536)
    """Width of the base model, for which the numbers of `optimizer` were chosen."""
    base_num_layers: int | None = Field(default=None, ge=1, le=1024)
    """Layers of the base model (CompleteP). Default: depth changes nothing, as in muP."""
    depth_alpha: float = Field(default=1.0, ge=0.5, le=1)
    """Power of the depth by which outputs of attention and MLP are divided: 1 in CompleteP,
    0.5 in depth-muP. Without effect without `base_num_layers`."""
