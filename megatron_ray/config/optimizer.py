"""Optimizer and learning-rate schedule.

Owns: their numbers. Must not know: sharding.
"""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ray.config.base import Config


class OptimizerConfig(Config):
    """AdamW with decoupled weight decay; 1-D parameters (norms, biases) are not
    decayed.
    """

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""
    lr: float = Field(gt=0, le=100)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    """Decoupled decay, multiplied by the learning rate."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off (the norm is still
    reported)."""
    freeze: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(
        default=(), max_length=64
    )
    """Names of parameters that are not trained, with `*` for any characters:
    `embedding.weight`, `layers.0.*`. They have no gradients and no optimizer state."""


class ScheduleConfig(Config):
    """Learning rate over steps: linear warm-up to `lr`, then a decay to `min_lr`."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up; may be longer than the job."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Step at which the decay ends, warm-up included; training.steps when not given."""
