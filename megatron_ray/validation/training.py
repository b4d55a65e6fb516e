"""Checks lengths, the number of samples, dropout and the loss scale.

Pure. Must not know: how many ranks there are.
"""

from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import Problem
from megatron_ray.config.schedules.batch_sizes import MAX_INCREMENTS, RampupConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.config.training import LossScaleConfig, TrainingConfig

MAX_SAMPLES = 1 << 31
"""The order of samples is an index of 12 bytes per sample in memory-mapped files, built
before the first step."""
_MIN_HEAD_WIDTH = 2
_MAX_HEAD_WIDTH = 1024
"""Bounds of model.head_dim, which hold too where it follows from other fields."""


def known_sample_problems(config: TrainConfig) -> list[Problem]:
    """Returns a problem when the job has more samples than can be ordered.

    The steps of a number of epochs are not known before the data are prepared.
    """
    steps = config.training.known_steps
    if steps is None:
        return []
    return sample_problems(config.training, steps)


def sample_problems(training: TrainingConfig, steps: int) -> list[Problem]:
    """Returns a problem when so many steps have more samples than can be ordered."""
    num_samples = training.batch_sizes.samples_after(steps)
    if num_samples <= MAX_SAMPLES:
        return []
    field = "steps"
    if training.epochs is not None:
        field = "epochs"
    elif training.tokens is not None:
        field = "tokens"
    counted = f"steps x global_batch_size = {steps} x {training.global_batch_size} ="
    if training.rampup_batch_size is not None:
        counted = f"{steps} steps of up to {training.global_batch_size} samples ="
    detail = (
        f"{counted} {num_samples} samples, at most {MAX_SAMPLES} can be ordered; lower "
        f"{field}, or use longer sequences"
    )
    return [Problem(f"/training/{field}", "too_many_samples", detail)]


def rampup_problems(training: TrainingConfig, dp: int) -> list[Problem]:
    """Returns a problem of batch sizes that cannot be spread over dp replicas.

    global_batch_size can.
    """
    rampup = training.rampup_batch_size
    full = training.global_batch_size
    multiple = training.micro_batch_size * dp
    if rampup is None:
        return []
    pointer = "/training/rampup_batch_size"
    if full == multiple:
        detail = (
            f"micro_batch_size x dp = {training.micro_batch_size} x {dp} is the whole "
            f"global_batch_size={full}, so no step can have fewer samples; leave it out, or "
            "lower micro_batch_size"
        )
        return [Problem(pointer, "rampup_sizes", detail)]
    if _is_legal(rampup, full, multiple):
        return []
    # The nearest start, and from there the nearest increment.
    start = min(max(1, round(rampup.start / multiple)) * multiple, full - multiple)
    increments = []
    for num_increments in range(1, MAX_INCREMENTS + 1):
        if (full - start) % (num_increments * multiple) == 0:
            increments.append((full - start) // num_increments)
    increment = min(increments, key=lambda size: abs(size - rampup.increment))
    detail = (
        f"start={rampup.start} and increment={rampup.increment} do not lead to "
        f"global_batch_size={full} in multiples of micro_batch_size x dp = "
        f"{training.micro_batch_size} x {dp} samples; use start={start} and "
        f"increment={increment}"
    )
    return [Problem(pointer, "rampup_sizes", detail)]


def _is_legal(rampup: RampupConfig, full: int, multiple: int) -> bool:
    growth = full - rampup.start
    if growth <= 0 or growth % rampup.increment:
        return False
    return rampup.start % multiple == 0 and rampup.increment % multiple == 0


def rampup_warnings(config: TrainConfig) -> list[Problem]:
    """Returns a ramp-up that the run does not complete."""
    training = config.training
    rampup = training.rampup_batch_size
    num_samples = training.batch_sizes.samples_after(training.num_steps)
    if rampup is None or num_samples > rampup.samples:
        return []
    detail = (
        f"samples={rampup.samples} is not below the run's {num_samples} samples, so no step "
        f"has global_batch_size={training.global_batch_size} samples"
    )
    pointer = "/training/rampup_batch_size/samples"
    return [Problem(pointer, "beyond_the_run", detail)]


def length_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of widths of heads, of sequences and of the vocabulary."""
    model = config.model
    training = config.training
    problems = _head_problems(model)
    if (
        model.position_embedding == "learned"
        and training.seq_length > model.max_sequence_length
    ):
        detail = (
            f"seq_length={training.seq_length} is longer than the "
            f"{model.max_sequence_length} learned positions; shorten it or raise "
            "model.max_sequence_length"
        )
        problems.append(Problem("/training/seq_length", "positions", detail))
    return problems + _vocabulary_problems(config)


def _head_problems(model: ModelConfig) -> list[Problem]:
    problems = []
    if not _MIN_HEAD_WIDTH <= model.head_width <= _MAX_HEAD_WIDTH:
        remedy = "use fewer heads, a larger hidden_size, or give head_dim"
        if model.head_width > _MAX_HEAD_WIDTH:
            remedy = f"use more heads, or give head_dim, at most {_MAX_HEAD_WIDTH}"
        detail = (
            f"hidden_size={model.hidden_size} over "
            f"num_attention_heads={model.num_attention_heads} leaves heads of width "
            f"{model.head_width}; {remedy}"
        )
        problems.append(Problem("/model/num_attention_heads", "head_width", detail))
    # Rotation turns pairs of elements.
    if model.position_embedding == "rope" and model.rotated_width % 2:
        detail = (
            f"rotary positions need an even head_dim, not {model.head_width}; change "
            "hidden_size, num_attention_heads or head_dim"
        )
        problems.append(Problem("/model/head_dim", "rope_even", detail))
    if model.num_attention_heads % model.kv_heads:
        detail = (
            f"num_query_groups={model.kv_heads} does not divide "
            f"num_attention_heads={model.num_attention_heads}; use one that does"
        )
        problems.append(Problem("/model/num_query_groups", "groups_divide", detail))
    return problems


def _vocabulary_problems(config: TrainConfig) -> list[Problem]:
    tokenizer = config.data.tokenizer
    vocab_size = config.model.vocab_size
    # The tokenizer is that of the weights.
    if config.checkpoint.start_from is not None:
        return []
    # Only a trained tokenizer's size is known from the config alone.
    if tokenizer.kind != "bpe" or vocab_size is None or tokenizer.vocab_size <= vocab_size:
        return []
    detail = (
        f"the tokenizer's {tokenizer.vocab_size} tokens do not fit into "
        f"model.vocab_size={vocab_size}; lower the first or raise the second"
    )
    return [Problem("/data/tokenizer/vocab_size", "vocab_fits", detail)]


def loss_scale_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of `training.loss_scale`."""
    training = config.training
    given = training.loss_scale
    if given is None:
        return []
    if training.scaling is None:
        detail = (
            f"loss_scale is for precision=fp16, not for {training.precision}, whose gradients "
            "need none; leave it out, or set precision to fp16"
        )
        return [Problem("/training/loss_scale", "loss_scale", detail)]
    problems = []
    defaults = LossScaleConfig()
    for name in LossScaleConfig.model_fields:
        is_given = getattr(given, name) != getattr(defaults, name)
        if given.constant is not None and name != "constant" and is_given:
            detail = (
                f"{name} is for a dynamic scale, and constant={given.constant:g} is given; "
                "leave one of them out"
            )
            problems.append(Problem(f"/training/loss_scale/{name}", "loss_scale", detail))
    if given.min_scale > given.initial_scale:
        detail = (
            f"min_scale={given.min_scale:g} is above initial_scale={given.initial_scale:g}; "
            "lower the first or raise the second"
        )
        problems.append(Problem("/training/loss_scale/min_scale", "loss_scale", detail))
    return problems


def precision_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of fields that are for precisions shorter than fp32."""
    training = config.training
    if training.precision != "fp32":
        return []
    problems = []
    if not training.grad_reduce_in_fp32:
        detail = (
            "grad_reduce_in_fp32=false reduces gradients in the type of precision, which is "
            "fp32 here; leave it out, or set precision to bf16"
        )
        problems.append(Problem("/training/grad_reduce_in_fp32", "short_precision", detail))
    if training.fp32_residual_connection:
        detail = (
            "fp32_residual_connection is for precision=bf16 and fp16; with fp32 everything is "
            "fp32 anyway; leave it out"
        )
        problems.append(
            Problem("/training/fp32_residual_connection", "short_precision", detail)
        )
    return problems


def dropout_problems(config: TrainConfig) -> list[Problem]:
    """Returns a problem when attention dropout is combined with context parallelism."""
    rate = config.model.attention_dropout
    cp = config.parallel.cp
    if not rate or cp == 1:
        return []
    detail = (
        f"attention_dropout={rate:g} is not supported with cp={cp}, whose attention keeps no "
        "probabilities to drop; use 0 (hidden_dropout is supported), or cp=1"
    )
    return [Problem("/model/attention_dropout", "attention_dropout", detail)]
