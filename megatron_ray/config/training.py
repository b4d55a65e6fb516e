"""Batch, steps, precision, evaluation.

Owns: what the loop needs. Must not know: model or layout.
"""

from typing import Literal

from pydantic import Field

from megatron_ray.config.base import Config


class RecomputeConfig(Config):
    """Which activations the forward pass does not keep: the backward pass computes them
    again from what is kept.
    """

    granularity: Literal["none", "selective", "full"] = "none"
    """`selective` does so with some modules of every layer, `full` with whole layers,
    of which only the inputs are kept."""
    method: Literal["uniform", "block"] | None = None
    """`full` only: `uniform` cuts a stage's layers into chunks of `num_layers` and
    keeps the input of each chunk; `block` recomputes the first `num_layers` layers of
    each stage one by one and keeps all of the others."""
    num_layers: int | None = Field(default=None, ge=1, le=1024)
    """`full` only: layers per chunk (`uniform`), or recomputed layers per stage
    (`block`)."""
    modules: (
        tuple[Literal["core_attention", "norm", "activation", "mlp", "moe"], ...] | None
    ) = Field(default=None, min_length=1)
    """`selective` only; core_attention when not given. `norm` (before attention and
    before the MLP) and `activation` (the MLP's non-linearity, or its experts') give
    their output's memory back once it is used; `mlp` is the whole of a plain MLP, `moe`
    that of a mixture. Fused attention keeps no scores, so there core_attention saves
    little; with model.attention_dropout it saves most."""

    @property
    def chosen_modules(self) -> tuple[str, ...]:
        """What is recomputed in every layer, resolved."""
        return (
            (self.modules or ("core_attention",)) if self.granularity == "selective" else ()
        )


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
    """Type of weights and activations; bf16 keeps fp32 main parameters, gradients and
    optimizer state."""
    recompute: RecomputeConfig = RecomputeConfig()
    """Trades arithmetic for memory: activations computed again instead of kept."""
    compile: Literal["none", "blocks"] = "none"
    """`blocks` has torch.compile fuse what a block does besides products and attention
    (norm, activation, rotation), and the loss: fewer trips to memory, for some seconds
    at the start of every process. Needs a C++ compiler and Python's headers on every
    node."""
    seed: int = Field(default=1234, ge=0, le=(1 << 63) - 1)
    """Seeds the weights, the data order and every random stream."""
    deterministic: bool = False
    """Asks for bit-exact kernels on GPU (slower); CPU runs are bit-exact either way."""
    eval_every_steps: int | None = Field(default=None, ge=1)
    """Evaluates on the validation split every so many steps and after the last; only
    after the last when not given."""
    eval_samples: int = Field(default=64, ge=1, le=1 << 24)
    """Validation samples per evaluation, at most as many as there are."""
