"""Names the fields of a config that may change on a resume.

A field is free (FREE_ON_RESUME), fixed (FIXED_ON_RESUME), or guarded: then it must be
named in checkpoint.resume_changes. Fields that are added later are guarded until they
are listed.

Pure. Must not know: values of fields.
"""

from collections.abc import Iterator
from difflib import get_close_matches

from pydantic import BaseModel

from megatron_ray.config.problem import Problem
from megatron_ray.config.schedules.rates import UNITS
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.config.training import LENGTHS

FREE_ON_RESUME = (
    "parallel",
    "training.micro_batch_size",
    "training.recompute",
    "training.compile",
    "training.cuda_graph",
    "training.deterministic",
    "training.eval_every_steps",
    "training.eval_samples",
    "training.max_skipped_steps",
    "training.max_consecutive_skipped_steps",
    "training.rules",
    "training.max_rollbacks",
    "training.inject_faults",
    "training.check_replicas_every_steps",
    "training.max_duration_s",
    "training.exit_every_steps",
    "training.skip_steps",
    "training.profile",
    "training.loss_scale",
    "training.grad_reduce_in_fp32",
    "training.fp8.param_gather",
    "optimizer.store_param_remainders",
    "optimizer.offload",
    "data.cache",
    "callbacks",
    "checkpoint",
    "storage",
    "model.preset",
    "model.init_std",
    "model.vocab_multiple",
    "model.spec",
)
"""Fields, and sections of fields, that change neither the model nor the learning rate nor
the samples of a run."""

FIXED_ON_RESUME = (
    "model",
    "optimizer.name",
    "optimizer.momentum",
    "optimizer.aggregated",
    "optimizer.freeze",
    "data.tokenizer",
)
"""Fields that the tensors of a checkpoint depend on, other than those below."""

CHANGEABLE_OF_MODEL = (
    "model.hidden_dropout",
    "model.attention_dropout",
    "model.norm_eps",
    "model.rope_theta",
    "model.rope_scaling",
    "model.sliding_window",
    "model.full_attention_every",
    "model.moe.aux_loss_coeff",
    "model.moe.aux_loss",
    "model.moe.z_loss_coeff",
    "model.moe.bias_update_rate",
    "model.moe.capacity_factor",
    "model.moe.pad_to_capacity",
    "model.moe.drop_policy",
    "model.mtp.loss_coeff",
)

DECAY_END = "schedule.decay_steps"
STEPS = "training.steps"
RAMPUP = "training.rampup_batch_size"
MOMENTS = "parallel.local_sgd.sync_moments_every"
OF_DECAY = (
    "schedule.min_lr",
    *(f"schedule.decay_{unit}" for unit in UNITS),
)
"""Fields without effect for a constant rate."""


def resume_changes_problems(config: TrainConfig) -> list[Problem]:
    """Returns problems of names in checkpoint.resume_changes."""
    known = set(_field_names(TrainConfig, ""))
    problems = []
    for index, name in enumerate(config.checkpoint.resume_changes):
        pointer = f"/checkpoint/resume_changes/{index}"
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = "use a name such as training.steps"
            if close:
                hint = f"did you mean {close[0]}?"
            problems.append(
                Problem(pointer, "unknown_field", f"there is no field {name!r}; {hint}")
            )
        elif is_fixed(name):
            detail = (
                f"{name} cannot change on a resume, because the checkpoint's tensors depend on "
                "it; take the name out, and start another run with checkpoint.start_from"
            )
            problems.append(Problem(pointer, "fixed_field", detail))
    return problems


def _field_names(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yields the dotted names of all fields and sections."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for nested in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(nested, type) and issubclass(nested, BaseModel):
                yield from _field_names(nested, f"{prefix}{name}.")


def is_within(field: str, names: tuple[str, ...]) -> bool:
    """Returns whether a field is one of those named, or inside a section named."""
    return any(field == name or field.startswith(f"{name}.") for name in names)


def is_accepted(field: str, config: TrainConfig) -> bool:
    """Returns whether checkpoint.resume_changes names a field, or a section it is in."""
    names = config.checkpoint.resume_changes
    if field == STEPS:
        # The length may be given in other units.
        return any(is_within(f"training.{length}", names) for length in LENGTHS)
    return is_within(field, names)


def is_fixed(field: str) -> bool:
    """Returns whether the tensors of a checkpoint depend on a field."""
    if is_within(field, (*CHANGEABLE_OF_MODEL, *FREE_ON_RESUME)):
        return False
    return is_within(field, FIXED_ON_RESUME)
