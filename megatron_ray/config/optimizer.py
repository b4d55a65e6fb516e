"""Defines the optimizer and the learning-rate schedule.

Must not know: how optimizer state is sharded.
"""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ray.config.base import Config

Pattern = Annotated[str, Field(min_length=1, max_length=256)]
"""Name of a parameter in which `*` matches any characters."""


class ParameterGroupConfig(Config):
    """Numbers of the optimizer for some parameters.

    What a group leaves out stays as in `optimizer`. Where several groups match a
    parameter, the last one that sets a number determines it.
    """

    parameters: tuple[Pattern, ...] = Field(min_length=1, max_length=16)
    """Names of parameters, as in `optimizer.freeze`."""
    weight_decay: float | None = Field(default=None, ge=0, le=10)
    """Weight decay of these parameters, norms and biases among them included. 0 spares
    them. Default: optimizer.weight_decay, and none for norms and biases."""
    lr_scale: float | None = Field(default=None, gt=0, le=10000)
    """Factor on the learning rate of every step, warm-up and min_lr included, and thus on
    what weight decay subtracts; reports show the rate without it. To train some
    parameters not at all use `optimizer.freeze`. Default: 1."""
    beta1: float | None = Field(default=None, ge=0, lt=1)
    """Decay rate of the first moment. Default: optimizer.beta1."""
    beta2: float | None = Field(default=None, ge=0, lt=1)
    """Decay rate of the second moment. Default: optimizer.beta2."""
    eps: float | None = Field(default=None, gt=0, le=1)
    """Added to the square root of the second moment. Default: optimizer.eps."""


class OptimizerConfig(Config):
    """AdamW with decoupled weight decay.

    One-dimensional parameters (norms and biases) are not decayed, unless one of the
    `groups` sets their weight decay.
    """

    name: Literal["adamw"] = "adamw"
    """Name of the optimizer; AdamW is the only one."""
    lr: float = Field(gt=0, le=100)
    """Peak learning rate, reached at the end of the warm-up."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of the second moment."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    """Decoupled weight decay: each step subtracts lr x weight_decay x weight. Default: no
    decay."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global norm when theirs is larger; 0 disables
    clipping, and the norm is still reported."""
    freeze: tuple[Pattern, ...] = Field(default=(), max_length=64)
    """Names of parameters that are not trained, where `*` matches any characters, such
    as `embedding.weight` or `layers.0.*`. They have no gradients and no optimizer
    state. Default: all parameters are trained."""
    groups: tuple[ParameterGroupConfig, ...] = Field(default=(), max_length=16)
    """Other numbers for parameters by name, such as no decay of embeddings:
    `[{parameters: ["embedding.*", "head.*"], weight_decay: 0}]`. Default: all
    parameters have the numbers above."""


class ScheduleConfig(Config):
    """Learning rate over steps: linear warm-up to `optimizer.lr`, then a decay."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay from `optimizer.lr` to `min_lr`; `constant` does not decay."""
    warmup_steps: int = Field(default=0, ge=0, le=1 << 40)
    """Steps of linear warm-up. A warm-up longer than the job never reaches
    `optimizer.lr`, which is noted before the start."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay; at most `optimizer.lr`."""
    decay_steps: int | None = Field(default=None, ge=1, le=1 << 40)
    """Step at which the decay ends, counted from step 0 with the warm-up included, and
    after it; then the rate stays at `min_lr`, which may be 0 for at most a tenth of the
    steps. Default: training.steps."""
