"""Defines the training loop's numbers: batch, steps, precision, evaluation.

Must not know: the model, the layout over ranks.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from megatron_ray.config.base import Config
from megatron_ray.config.cuda_graph import CudaGraphConfig
from megatron_ray.config.faults.injection import FaultConfig
from megatron_ray.config.faults.rules import RuleConfig
from megatron_ray.config.schedules.batch_sizes import (
    MAX_INCREMENTS,
    BatchSizes,
    RampupConfig,
)
from megatron_ray.config.schedules.lengths import Clock

LENGTHS = ("steps", "epochs", "tokens")
"""Fields of TrainingConfig of which exactly one is given."""


class RecomputeConfig(Config):
    """Activation recomputation: less memory for more arithmetic.

    Activations are not kept in the forward pass but computed again in the backward
    pass.
    """

    granularity: Literal["none", "selective", "operations", "full"] = "none"
    """`selective` recomputes the given `modules` of every layer, `full` recomputes whole
    layers and keeps only their inputs. `operations` keeps the outputs of the operations in
    `save` besides, and recomputes the rest of every layer from them."""
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
    save: (
        tuple[Literal["products", "attention", "reduce_scatter", "all_to_all"], ...] | None
    ) = Field(default=None, min_length=1)
    """`operations` only: what is not computed again. `products` are the matrix products of
    linear layers, of which `every` chooses some; `attention` is the output of the
    attention itself, and what its kernel keeps; `reduce_scatter` the sum over tp after the
    attention's last product and that of a shared expert, also where it is an all-reduce,
    which saves the product too; `all_to_all` the rows that experts exchange, there and
    back. Default: all. Attention with dropout on its probabilities is always
    recomputed."""
    every: int | None = Field(default=None, ge=1, le=16)
    """`operations` only: `products` are every n-th one of a layer, counted from the first:
    1 is all of them. Default: 2."""

    @property
    def saved_operations(self) -> tuple[str, ...]:
        """Operations of every layer whose outputs are kept, resolved."""
        if self.granularity != "operations":
            return ()
        return self.save or ("products", "attention", "reduce_scatter", "all_to_all")

    def saves_product(self, position: int) -> bool:
        """Returns whether the output of a layer's product (counted from 0) is kept.

        Products are counted in the order of the forward pass: those of attention, then
        router, shared expert and experts, or the MLP's.
        """
        return "products" in self.saved_operations and position % (self.every or 2) == 0

    @property
    def chosen_modules(self) -> tuple[str, ...]:
        """Modules that are recomputed in every layer, resolved."""
        if self.granularity != "selective":
            return ()
        return self.modules or ("core_attention",)


class LossScaleConfig(Config):
    """Scaling of the loss in fp16, which keeps small gradients above the smallest number.

    The loss, a mean over the step's tokens, is multiplied before the backward pass, and
    gradients are divided before they are clipped and reported.
    """

    constant: float | None = Field(default=None, gt=0, le=2.0**64)
    """A scale that stays as it is; the other fields are then left out. An overflow counts
    for training.max_skipped_steps. Default: a dynamic scale, which is multiplied by
    `backoff_factor` when gradients overflow, and by `growth_factor` after
    `growth_interval` steps without. A step that overflows is skipped, and does not count
    for training.max_skipped_steps unless the scale is `min_scale` already."""
    initial_scale: float = Field(default=2.0**32, gt=0, le=2.0**64)
    """Scale of the first step. From a high one the first steps are skipped, one for each
    halving."""
    min_scale: float = Field(default=1.0, gt=0, le=2.0**64)
    """Smallest scale."""
    growth_interval: int = Field(default=1000, ge=1, le=1 << 40)
    """Steps in a row without an overflow after which the scale is raised."""
    growth_factor: float = Field(default=2.0, ge=1, le=2.0**16)
    """Factor by which the scale is raised; 1 never raises it."""
    backoff_factor: float = Field(default=0.5, gt=0, lt=1)
    """Factor by which the scale is lowered."""
    hysteresis: int = Field(default=2, ge=1, le=1 << 40)
    """Overflows after which the scale is lowered, counted since it was last raised: each
    further one lowers it again."""

    @property
    def first_scale(self) -> float:
        """Scale of the first step."""
        if self.constant is not None:
            return self.constant
        return self.initial_scale


MAX_PROFILED_STEPS = 20
"""Steps of one profile: a trace of more takes minutes to write and cannot be opened."""


STEPS_PATTERN = "^[0-9]{1,13}(-[0-9]{1,13})?$"
STEPS_RULE = (
    "must be a first and a last step, counted from 1, such as 10-12, with at most "
    f"{MAX_PROFILED_STEPS} steps"
)


class ProfileConfig(Config):
    """A profile of some steps: where their time and memory go."""

    steps: str = Field(pattern=STEPS_PATTERN)
    """First and last step, such as 10-12, counted from 1; at most 20 of them. The first
    steps of a process also compile, allocate and connect, so later ones say more. Steps
    that are done before a resume are not profiled again."""
    ranks: tuple[Annotated[int, Field(ge=0, lt=1 << 20)], ...] = Field(
        default=(0,), min_length=1, max_length=64
    )
    """Ranks that record them. The others wait for these, whose steps take longer."""

    @field_validator("steps", mode="before")
    @classmethod
    def _single_step(cls, steps: Any) -> Any:
        # YAML reads a single step as a number.
        if isinstance(steps, int) and not isinstance(steps, bool):
            return str(steps)
        return steps

    @field_validator("steps")
    @classmethod
    def _few_steps(cls, steps: str) -> str:
        if not is_profilable(*step_range(steps)):
            raise PydanticCustomError("step_range", STEPS_RULE)
        return steps

    @property
    def first_and_last(self) -> tuple[int, int]:
        """The first and the last step."""
        return step_range(self.steps)


def step_range(steps: str) -> tuple[int, int]:
    """Returns the first and the last step of `10-12`, or of a single one."""
    first, _, last = steps.partition("-")
    return int(first), int(last or first)


def is_profilable(first: int, last: int) -> bool:
    """Whether a profile may have these steps."""
    return 1 <= first <= last < first + MAX_PROFILED_STEPS


class Fp8Config(Config):
    """Matrix products in FP8, numbers of one byte with scales.

    The linear layers of every layer multiply in FP8: attention's projections, MLPs and
    experts, forward and backward. Their inputs, weights and gradients of outputs are
    quantized right before the product; everything else stays in bf16: embedding, norms,
    attention itself, routers, the output layer and all activations that are kept. GPUs
    from Ada and Hopper on multiply in FP8 (`blockwise`: Hopper with CUDA 12.9; `mxfp8`:
    Blackwell); elsewhere the numbers are the same and products slower than in bf16.
    """

    recipe: Literal["delayed", "current", "blockwise", "mxfp8"]
    """Where scales come from. `delayed`: one for each input, weight and gradient, from
    their largest values in the steps before, which are part of checkpoints. `current`:
    one for each tensor, from its own largest value, which takes another pass over it.
    `blockwise`: a power of two for each 128 elements of a row, in weights for each 128 x
    128. `mxfp8`: a power of two for each 32 elements of a row."""
    format: Literal["e4m3", "hybrid"] | None = None
    """`e4m3` has 3 bits of mantissa and numbers up to 448; `hybrid` uses it for inputs
    and weights, and E5M2, with 2 bits and numbers up to 57,344, for gradients. Default:
    hybrid for delayed and current, e4m3 for blockwise and mxfp8, which have no other."""
    margin: int = Field(default=0, ge=0, le=16)
    """`delayed` only: scales are divided by 2^margin, which leaves room for values that
    grow from one step to the next."""
    amax_history_length: int = Field(default=1, ge=1, le=4096)
    """`delayed` only: number of steps whose largest values are kept."""
    amax_algorithm: Literal["most_recent", "max"] = "most_recent"
    """`delayed` only: the step that a scale is made from, the last one or, of those
    that are kept, the one with the largest value."""
    param_gather: bool = False
    """`current` with parallel.zero=3: whether weights that are multiplied in FP8 are
    quantized before they are gathered instead of before each product. They are sent, and
    kept by the ranks that gather them, as numbers of one byte, half of bf16. No number
    changes."""
    first_layers_in_bf16: int = Field(default=0, ge=0, le=1024)
    """Number of layers at the start of the model that multiply in bf16."""
    last_layers_in_bf16: int = Field(default=0, ge=0, le=1024)
    """Number of layers at the end of the model that multiply in bf16; from 1 on with
    those of multi-token prediction."""

    @property
    def grad_format(self) -> str:
        """Format of gradients: `e4m3` or `e5m2`."""
        if self.recipe in ("blockwise", "mxfp8") or self.format == "e4m3":
            return "e4m3"
        return "e5m2"

    def covers(self, layer: int, num_layers: int) -> bool:
        """Returns whether a layer (from 0; MTP layers follow) multiplies in FP8."""
        # MTP layers come after the last one.
        end = num_layers - self.last_layers_in_bf16
        is_before_end = layer < end or self.last_layers_in_bf16 == 0
        return self.first_layers_in_bf16 <= layer and is_before_end


class TrainingConfig(Config):
    """Batch, steps, precision, recomputation and evaluation."""

    seq_length: int = Field(ge=1, le=1 << 24)
    """Length of a sample in tokens."""
    micro_batch_size: int = Field(default=1, ge=1, le=65536)
    """Samples per data-parallel rank in one forward and backward pass. Larger values use
    the GPU better and need more memory."""
    global_batch_size: int = Field(ge=1, le=1 << 24)
    """Samples per optimizer step over all ranks; a multiple of micro_batch_size x dp."""
    rampup_batch_size: RampupConfig | None = None
    """Fewer samples per step in the beginning, as with Megatron's --rampup-batch-size.
    Lengths in steps count the smaller ones too. Default: every step has
    global_batch_size."""
    epochs: float | None = Field(default=None, gt=0, le=1 << 20)
    """Instead of `steps`: passes over the training documents. As many whole steps as fit
    into them, at least one; a plan cannot know the number, so it is reported once the
    data are prepared. Of a blend, a pass is as many tokens as its corpora have together,
    taken by their weights."""
    tokens: int | None = Field(default=None, ge=1, le=1 << 62)
    """Instead of `steps`: tokens to train on, rounded up to whole samples of seq_length
    tokens and then to whole steps."""
    steps: int | None = Field(default=None, ge=1, le=1 << 40)
    """Number of optimizer steps of the whole job. Exactly one of `steps`, `epochs` and
    `tokens` is given."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of weights and activations in the forward and backward pass. bf16 and fp16
    keep master weights, gradients and optimizer state in fp32. fp16 has more digits and
    a smaller range than bf16, and scales the loss; on CPUs its products are in fp32."""
    loss_scale: LossScaleConfig | None = None
    """Scaling of the loss; only with precision=fp16, which has a dynamic scale by
    default."""
    fp8: Fp8Config | None = None
    """Matrix products of linear layers in FP8; only with precision=bf16. Default: all
    products are in the type of `precision`."""
    fp32_residual_connection: bool = False
    """Whether hidden states between layers, to which each layer adds its output, are
    fp32 while the layers themselves compute in bf16 or fp16. Deep models lose less in
    the sums; hidden states and messages between pipeline stages have twice the bytes."""
    grad_reduce_in_fp32: bool = True
    """Whether gradients are added up over microbatches and reduced over ranks in fp32.
    Otherwise they are in the type of `precision`, bf16 or fp16: half the bytes to send and
    to keep, and less precise sums. The update and the norm are computed in fp32 either
    way, for which each rank keeps fp32 copies of the gradients that it updates with.
    Under zero=3 gradients are added up in fp32 and only reduced in that type."""
    recompute: RecomputeConfig = RecomputeConfig()
    """Activation recomputation, which saves memory. Default: none."""
    compile: Literal["none", "blocks"] = "none"
    """`blocks` lets torch.compile fuse the elementwise operations of each block (norm,
    activation, rotation) and the loss, which reads and writes less memory. It adds some
    seconds to the start of every process, and every node needs a C++ compiler and
    Python's headers."""
    cuda_graph: CudaGraphConfig | None = None
    """A CUDA graph of all forward and backward passes of a step, which the host launches at
    once. No number changes. Default: the host launches every kernel by itself."""
    seed: int = Field(default=1234, ge=0, le=(1 << 63) - 1)
    """Seed of the initial weights, the order of samples and every random stream."""
    deterministic: bool = False
    """Uses only bit-reproducible kernels on GPUs, which are slower: torch's deterministic
    algorithms, cuDNN's, a fixed workspace of cuBLAS, and no reductions in NCCL's switches.
    A kernel without such a form ends the run at its first step, with its name. Runs on
    CPUs are bit-reproducible without it."""
    eval_every_steps: int | None = Field(default=None, ge=1, le=1 << 40)
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
    rules: tuple[RuleConfig, ...] = Field(default=(), max_length=16)
    """Rules for the loss and the gradient norm of every step, each with an action. Verdicts
    are read from the device with the step's numbers, on GPUs one step later; the weights
    have not changed meanwhile. Default: none, and only a step that is not finite ends the
    job."""
    max_rollbacks: int = Field(default=3, ge=0, le=100)
    """Number of rollbacks by `rules` in the whole job; one more ends it."""
    inject_faults: tuple[FaultConfig, ...] = Field(default=(), max_length=16)
    """Faults that are injected into the numbers of chosen steps, to rehearse what `rules`
    make of them. Default: none."""
    check_replicas_every_steps: int | None = Field(default=None, ge=1, le=1 << 40)
    """Steps between comparisons of the weights on all replicas, which must be equal to the
    bit. A difference, as memory errors make, ends the attempt and names ranks and
    parameter. Each one reads all weights once. Default: never."""
    max_duration_s: float | None = Field(default=None, gt=0, le=86400 * 3650)
    """Seconds of training, from the moment at which the ranks begin to build the model.
    After the first step beyond them the run saves a checkpoint and ends: under torchrun,
    Slurm and Ray Train with exit code 75, as a job with the state `succeeded` and the reason
    `planned_exit`. Resumed, it trains as long again. Leave time for a step and a checkpoint
    before a limit of the batch system. Default: the run ends after its last step."""
    exit_every_steps: int | None = Field(default=None, ge=1, le=1 << 40)
    """The run ends like at max_duration_s after every step whose number is a multiple of
    this one. Default: never."""
    skip_steps: tuple[Annotated[int, Field(ge=1, le=1 << 40)], ...] = Field(
        default=(), max_length=1024
    )
    """Steps, counted from 1, whose samples are left out: they are skipped like steps
    that are not finite, whatever their numbers are, and are not counted as such. For a
    run that is resumed before a batch that it cannot train on. Default: none."""

    profile: ProfileConfig | None = None
    """Steps whose time and memory are recorded, in files below `profiles/` in storage.path:
    a trace of every operator, and the memory. `megatron-ray profile` does it for a job that
    runs. Default: none."""

    @field_validator("steps")
    @classmethod
    def _one_length(cls, steps: int | None, info: ValidationInfo) -> int | None:
        # A field that is wrong itself is not in the data, and has its own error.
        lengths = [steps, info.data.get("epochs", 1), info.data.get("tokens", 1)]
        num_given = len(lengths) - lengths.count(None)
        if num_given == 0:
            raise PydanticCustomError(
                "int_or_other_length",
                "must be a whole number, got null; or give training.epochs or "
                "training.tokens instead",
            )
        if num_given > 1 and info.data.keys() >= {"epochs", "tokens"}:
            raise PydanticCustomError(
                "one_length",
                "only one of training.steps, training.epochs and training.tokens may be "
                "given; leave the others out",
            )
        return steps

    @field_validator("rampup_batch_size")
    @classmethod
    def _few_sizes(
        cls, rampup: RampupConfig | None, info: ValidationInfo
    ) -> RampupConfig | None:
        full = info.data.get("global_batch_size")
        # Which sizes are legal depends on the layout, see megatron_ray.validation.
        if rampup is not None and full is not None:
            num_increments = rampup.num_increments(full)
            if num_increments > MAX_INCREMENTS:
                raise PydanticCustomError(
                    "too_many_sizes",
                    "grows {num_increments} times, at most {most} times are possible; raise "
                    "increment",
                    {"num_increments": num_increments, "most": MAX_INCREMENTS},
                )
        return rampup

    @property
    def batch_sizes(self) -> BatchSizes:
        """The number of samples of each step."""
        return BatchSizes(self.global_batch_size, self.rampup_batch_size)

    def clock(self, steps: int) -> Clock:
        """Returns what counts the samples of a run of so many steps."""
        return Clock(self.batch_sizes, self.seq_length, steps)

    @property
    def scaling(self) -> LossScaleConfig | None:
        """How the loss is scaled; None where it is not."""
        if self.precision != "fp16":
            return None
        return self.loss_scale or LossScaleConfig()

    @property
    def gathers_in_fp8(self) -> bool:
        """Whether ZeRO-3 gathers weights that are multiplied in FP8 as such."""
        return self.fp8 is not None and self.fp8.param_gather

    @property
    def checks_own_gradients(self) -> bool:
        """Whether a rule has every rank check its gradients before their reduction."""
        return any(rule.before_reduction for rule in self.rules)

    @property
    def grad_precision(self) -> str:
        """Precision in which gradients are added up and reduced."""
        if self.grad_reduce_in_fp32:
            return "fp32"
        return self.precision

    @property
    def known_steps(self) -> int | None:
        """Number of steps; None for `epochs`, which depend on the data."""
        if self.tokens is None:
            return self.steps
        # Ceiling division.
        num_samples = -(-self.tokens // self.seq_length)
        return self.batch_sizes.steps_until(num_samples)

    def steps_over(self, num_tokens: int) -> int:
        """Returns the number of steps on training data of `num_tokens`."""
        if self.epochs is None:
            return self.num_steps
        # A sample has one extra token, the label of the last input.
        num_samples = (int(self.epochs * num_tokens) - 1) // self.seq_length
        # Whole steps only, so that no document is used once more than asked for.
        return max(1, self.batch_sizes.steps_within(num_samples))

    @property
    def num_steps(self) -> int:
        """Number of steps. Raises ValueError while it depends on the data."""
        steps = self.known_steps
        if steps is None:
            raise ValueError("training.epochs is not resolved")
        return steps
