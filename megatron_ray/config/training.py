"""Defines the training loop's numbers: batch, steps, precision, evaluation.

Must not know: the model, the layout over ranks.
"""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ray.config.base import Config


class RecomputeConfig(Config):
    """Activation recomputation: less memory for more arithmetic.

    Activations are not kept in the forward pass but computed again in the backward
    pass.
    """

    granularity: Literal["none", "selective", "full"] = "none"
    """`selective` recomputes the given `modules` of every layer, `full` recomputes whole
    layers and keeps only their inputs."""
    method: Literal["uniform", "block"] | None = None
    """`full` only, and required there. `uniform` divides a stage's layers into chunks of
    `num_layers` and keeps the input of each chunk; `block` recomputes the first
    `num_layers` layers of each stage one by one and keeps all activations of the
    others."""
    num_layers: int | None = Field(default=None, ge=1, le=1024)
    """`full` only, and required there: layers per chunk (`uniform`), or recomputed layers
    per stage (`block`)."""
    modules: (
        tuple[Literal["core_attention", "norm", "activation", "mlp", "moe"], ...] | None
    ) = Field(default=None, min_length=1)
    """`selective` only: what is recomputed. `core_attention` is the attention itself,
    without its projections; fused attention keeps no scores, so it saves little unless
    model.attention_dropout is set. `norm` (before attention and before the MLP) and
    `activation` (the activation function of the MLP or of the experts) free their output
    after its last use. `mlp` is a whole plain MLP, `moe` a whole mixture of experts.
    Default: core_attention."""

    @property
    def chosen_modules(self) -> tuple[str, ...]:
        """Modules that are recomputed in every layer, resolved."""
        if self.granularity != "selective":
            return ()
        return self.modules or ("core_attention",)


class TrainingConfig(Config):
    """Batch, steps, precision, recomputation and evaluation."""

    seq_length: int = Field(ge=1, le=1 << 24)
    """Length of a sample in tokens."""
    micro_batch_size: int = Field(default=1, ge=1, le=65536)
    """Samples per data-parallel rank in one forward and backward pass. Larger values use
    the GPU better and need more memory."""
    global_batch_size: int = Field(ge=1, le=1 << 24)
    """Samples per optimizer step over all ranks; a multiple of micro_batch_size x dp."""
    steps: int = Field(ge=1, le=1 << 40)
    """Number of optimizer steps of the whole job."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations in the forward and backward pass. bf16 keeps
    master weights, gradients and optimizer state in fp32."""
    recompute: RecomputeConfig = RecomputeConfig()
    """Activation recomputation, which saves memory. Default: none."""
    compile: Literal["none", "blocks"] = "none"
    """`blocks` lets torch.compile fuse the elementwise operations of each block (norm,
    activation, rotation) and the loss, which reads and writes less memory. It adds some
    seconds to the start of every process, and every node needs a C++ compiler and
    Python's headers."""
    seed: int = Field(default=1234, ge=0, le=(1 << 63) - 1)
    """Seed of the initial weights, the order of samples and every random stream."""
    deterministic: bool = False
    """Uses only bit-reproducible kernels on GPUs, which are slower. Runs on CPUs are
    bit-reproducible without it."""
    eval_every_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations on the validation data; the last step is evaluated too.
    Default: evaluation after the last step only."""
    eval_samples: int = Field(default=64, ge=1, le=1 << 24)
    """Validation samples per evaluation, or fewer when the validation data has fewer."""
    max_skipped_steps: int = Field(default=0, ge=0, le=1 << 40)
    """Number of steps of the whole job that are skipped when their loss or gradient norm
    is not finite. A skipped step leaves weights and optimizer state as they are; it
    counts as a step and its samples as consumed. One more ends the job. Default: the
    first such step ends the job."""
    max_consecutive_skipped_steps: int = Field(default=3, ge=1, le=1 << 40)
    """Number of skipped steps in a row; one more ends the job even if
    max_skipped_steps allows it, because weights that give no numbers do not recover."""
    skip_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), max_length=1024)
    """Steps, counted from 1, whose samples are left out: they are skipped like steps
    that are not finite, whatever their numbers are, and are not counted as such. For a
    run that is resumed before a batch that it cannot train on. Default: none."""
