"""Batch, steps, precision, evaluation. Owns: what the loop needs. Must not know: model or layout."""

from typing import Literal

from pydantic import Field

from megatron_ray.config.base import Config


class TrainingConfig(Config):
    """The loop's numbers."""

    seq_length: int = Field(ge=1, le=1 << 24)
    """Tokens in one sample."""
    micro_batch_size: int = Field(default=1, ge=1, le=65536)
    """Samples per data-parallel rank and forward pass."""
    global_batch_size: int = Field(ge=1, le=1 << 24)
    """Samples per optimizer step, over all ranks."""
    steps: int = Field(ge=1, le=1 << 40)
    """Optimizer updates in the whole job."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations; bf16 keeps fp32 main parameters, gradients and optimizer state."""
    seed: int = Field(default=1234, ge=0, le=(1 << 63) - 1)
    """Seeds the weights, the data order and every random stream."""
    deterministic: bool = False
    """Asks for bit-exact kernels on GPU (slower); CPU runs are bit-exact either way."""
    eval_every_steps: int | None = Field(default=None, ge=1)
    """Evaluates on the validation split every so many steps and after the last; only after the last when not given."""
    eval_samples: int = Field(default=64, ge=1, le=1 << 24)
    """Validation samples per evaluation, at most as many as there are."""
