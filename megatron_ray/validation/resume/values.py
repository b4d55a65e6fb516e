"""Returns the values of a config that must not change silently on a resume.

Pure. Must not know: the config that they are compared with.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.config.training import LENGTHS
from megatron_ray.validation.initial_weights import model_signature
from megatron_ray.validation.resume.fields import (
    CHANGEABLE_OF_MODEL,
    DECAY_END,
    FREE_ON_RESUME,
    MOMENTS,
    OF_DECAY,
    RAMPUP,
    STEPS,
    is_within,
)

_GUARDED_WITHIN = ("parallel.local_sgd",)
"""Fields inside of free sections that do change how a model is trained."""

_TRAINING_FIELDS_OF_MODEL = ("hidden_dropout", "attention_dropout")
_TRAINING_FIELDS_OF_MOE = tuple(
    name.removeprefix("model.moe.")
    for name in CHANGEABLE_OF_MODEL
    if name.startswith("model.moe.")
)

_NOT_OF_SAMPLES = {"max_bad_records", "name"}
"""Fields of a source that do not change its samples."""


def guarded_values(config: TrainConfig) -> dict[str, Any]:
    """Returns the values that must not change silently, by dotted field name.

    Fields that have no effect beside others are left out, so that only a change of the
    run counts as one.
    """
    sections = config.model_dump(mode="json", include=set(TrainConfig.model_fields))
    del sections["model"]
    values = {}
    for field, value in _leaves(sections, ""):
        is_guarded = is_within(field, _GUARDED_WITHIN)
        if is_guarded or not is_within(field, FREE_ON_RESUME):
            values[field] = value
    values.update(_model_values(config))
    values.update(_data_values(config))
    # A decay that ends with the job depends on its length, any other rate does not. The
    # order of samples never does.
    for length in LENGTHS:
        del values[f"training.{length}"]
    schedule = config.schedule
    if schedule.kind == "constant":
        for field in OF_DECAY:
            del values[field]
    elif not schedule.length_fields("decay"):
        values[DECAY_END] = config.training.known_steps
    if _counts_shares(config):
        values[STEPS] = config.training.known_steps
    # One field each for users, who set it as a whole.
    for field in tuple(values):
        if is_within(field, (RAMPUP, MOMENTS)):
            del values[field]
    return values | _whole_values(config)


def _whole_values(config: TrainConfig) -> dict[str, Any]:
    """Returns sections that count as one value each."""
    values: dict[str, Any] = {RAMPUP: "no ramp-up"}
    rampup = config.training.rampup_batch_size
    if rampup is not None:
        values[RAMPUP] = ", ".join(f"{name}={size}" for name, size in rampup)
    local_sgd = config.parallel.local_sgd
    if local_sgd is not None:
        values[MOMENTS] = local_sgd.sync_moments_every
    return values


def _counts_shares(config: TrainConfig) -> bool:
    """Returns whether more than a decay without an end depends on the number of steps."""
    optimizer = config.optimizer
    if optimizer.weight_decay_schedule is not None or config.schedule.has_shares:
        return True
    for switch in optimizer.switches:
        if switch.schedule is not None and switch.schedule.ends_with_the_run:
            return True
    return False


def can_stay(config: TrainConfig) -> bool:
    """Returns whether a longer run can go on at min_lr."""
    return config.schedule.min_lr > 0 and not _counts_shares(config)


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _model_values(config: TrainConfig) -> dict[str, Any]:
    model = config.model
    values = {}
    for field, value in model_signature(model).items():
        values[f"model.{field}"] = value
    # Positions that are not learned have no longest sequence.
    if model.position_embedding != "learned":
        del values["model.max_sequence_length"]
    for name in _TRAINING_FIELDS_OF_MODEL:
        values[f"model.{name}"] = getattr(model, name)
    if model.moe is not None:
        for name in _TRAINING_FIELDS_OF_MOE:
            values[f"model.moe.{name}"] = getattr(model.moe, name)
    if model.mtp is not None:
        values["model.mtp.loss_coeff"] = model.mtp.loss_coeff
    return values


def _data_values(config: TrainConfig) -> dict[str, Any]:
    data = config.data
    sources = []
    for source in data.train:
        sources.append(source.model_dump(mode="json", exclude=_NOT_OF_SAMPLES))
    values: dict[str, Any] = {"data.train": sources}
    # Other validation data leave the training data alone, unless documents of these are
    # held out.
    if data.validation:
        values["data.validation"] = "sources of its own"
        values["data.validation_fraction"] = None
    else:
        values["data.validation"] = "documents held out of data.train"
    # A tokenizer file may have moved; its content is compared where it is read.
    values["data.tokenizer.path"] = None
    if data.tokenizer.kind != "bpe":
        values["data.tokenizer.vocab_size"] = None
    return values
