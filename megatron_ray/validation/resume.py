"""Checks that a run which resumes goes on as the run that wrote its checkpoint.

Owns: which fields of a config may change on a resume. A field is free (FREE_ON_RESUME),
fixed (FIXED_ON_RESUME), or guarded: then it must be named in checkpoint.resume_changes.
Fields that are added later are guarded until they are listed.

Pure. Must not know: files, checkpoints.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, TypeGuard

from pydantic import BaseModel

from megatron_ray.config.problem import Problem
from megatron_ray.config.schedules.rates import UNITS
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.config.training import LENGTHS
from megatron_ray.validation.initial_weights import is_same, model_signature

FREE_ON_RESUME = (
    "parallel",
    "training.micro_batch_size",
    "training.recompute",
    "training.compile",
    "training.deterministic",
    "training.eval_every_steps",
    "training.eval_samples",
    "training.max_skipped_steps",
    "training.max_consecutive_skipped_steps",
    "training.rules",
    "training.max_rollbacks",
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

_GUARDED_WITHIN = ("parallel.local_sgd",)
"""Fields inside of free sections that do change how a model is trained."""

FIXED_ON_RESUME = (
    "model",
    "optimizer.name",
    "optimizer.momentum",
    "optimizer.aggregated",
    "optimizer.freeze",
    "data.tokenizer",
)
"""Fields that the tensors of a checkpoint depend on, other than those below."""

_CHANGEABLE_OF_MODEL = (
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
_TRAINING_FIELDS_OF_MODEL = ("hidden_dropout", "attention_dropout")
_TRAINING_FIELDS_OF_MOE = tuple(
    name.removeprefix("model.moe.")
    for name in _CHANGEABLE_OF_MODEL
    if name.startswith("model.moe.")
)

_DECAY_END = "schedule.decay_steps"
_STEPS = "training.steps"
_RAMPUP = "training.rampup_batch_size"
_MOMENTS = "parallel.local_sgd.sync_moments_every"
_OF_DATA = ("model.vocab_size", _DECAY_END, _STEPS)
_OF_DECAY = (
    "schedule.min_lr",
    *(f"schedule.decay_{unit}" for unit in UNITS),
)
"""Fields without effect for a constant rate."""

_DERIVED = {
    "hidden_size": ("head_dim", "ffn_hidden_size", "moe.ffn_hidden_size"),
    "num_attention_heads": ("head_dim", "num_query_groups"),
    "ffn_hidden_size": ("moe.ffn_hidden_size",),
}
"""Fields of a model that follow from another one where they are not given."""

_EFFECTS = {
    "training.steps": "the learning rate would decay over another number of steps",
    _RAMPUP: "steps would have another number of samples",
    "schedule": "the learning rate would be another one",
    "optimizer.lr": "the learning rate would be another one",
    "training.seed": "samples would come in another order, some of them again",
    "training.seq_length": "samples would be others, with text that was trained on already",
    "data": "samples would be others, with text that was trained on already",
    "parallel.local_sgd": "replica groups would synchronize otherwise",
}
"""What a change would do, by field or section; other fields need no explanation."""


@dataclass(frozen=True)
class ResumeComparison:
    """How the config of a run differs from that of its checkpoint."""

    problems: tuple[Problem, ...]
    accepted: tuple[str, ...]
    """A line for each change that checkpoint.resume_changes names."""
    changed: tuple[str, ...] = ()
    """Names of all fields that differ."""

    @property
    def changes_order(self) -> bool:
        """Whether samples come from other data or in another order."""
        return any(_is_within(field, _ORDER_FIELDS) for field in self.changed)


CorpusSize = tuple[int, int]
"""Tokens and documents of a corpus to train on, which another text hardly ever has."""

_NOT_OF_SAMPLES = {"max_bad_records", "name"}
"""Fields of a source that do not change its samples."""

_TRAIN = "data.train"
_MAX_LISTED = 4
_ORDER_FIELDS = ("data", "training.seq_length", "training.seed")


def compare(config: TrainConfig, saved: TrainConfig, origin: str) -> ResumeComparison:
    """Compares a run's config with the one that it had when it was saved.

    `origin` names the latter in messages, as in "the checkpoint X was made with".
    """
    own_values = _guarded_values(config)
    saved_values = _guarded_values(saved)
    for field in _explained_by_others(config, saved, {*own_values, *saved_values}):
        own_values.pop(field, None)
        saved_values.pop(field, None)
    problems = []
    accepted = []
    changed = []
    for field in dict.fromkeys((*own_values, *saved_values)):
        value = own_values.get(field)
        saved_value = saved_values.get(field)
        if is_same(value, saved_value):
            continue
        # What follows from the data is compared once they are prepared.
        if field in _OF_DATA and value is None:
            continue
        # The decay that ends with the job is another one because the job is.
        name = field
        if field == _DECAY_END and config.schedule.decay_steps is None:
            name = _STEPS
        if name in changed:
            continue
        changed.append(name)
        value, saved_value = _differing(value, saved_value)
        if _is_fixed(name) or not _is_accepted(name, config):
            detail = _describe(name, value, f"{origin} {saved_value}")
            if field == _DECAY_END and name == _STEPS and _can_stay(config):
                detail += (
                    f", or set schedule.decay_steps to {saved_value} to stay at min_lr"
                )
            problems.append(Problem(_pointer(name), "resume_change", detail))
        else:
            accepted.append(f"{name} is {value}, and was {saved_value} until now")
    return ResumeComparison(tuple(problems), tuple(accepted), tuple(changed))


def _differing(value: object, saved: object) -> tuple[object, object]:
    """Returns what differs between two values; of lists of objects, the first entry."""
    if not _are_objects(value) or not _are_objects(saved):
        return value, saved
    if len(value) != len(saved):
        return f"a list of {len(value)}", f"a list of {len(saved)}"
    for number, (entry, saved_entry) in enumerate(zip(value, saved, strict=True)):
        names = [name for name in entry if entry[name] != saved_entry[name]]
        if names:
            fields = ", ".join(f"{name} {entry[name]}" for name in names)
            saved_fields = ", ".join(f"{name} {saved_entry[name]}" for name in names)
            return f"{fields} in entry {number}", saved_fields
    return value, saved


def _are_objects(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def with_corpora(
    comparison: ResumeComparison,
    config: TrainConfig,
    sizes: Sequence[CorpusSize],
    saved: Sequence[CorpusSize],
) -> ResumeComparison:
    """Returns a comparison with that of the corpora of `data.train`, in their order.

    Files at the same paths may have another content by now.
    """
    # Other fields of the data explain other sizes.
    is_explained = any(_is_within(field, ("data",)) for field in comparison.changed)
    if is_explained or list(sizes) == list(saved):
        return comparison
    detail = (
        f"the files have changed: they give {_listed(sizes)} to train on, and gave "
        f"{_listed(saved)} when the run was saved"
    )
    changed = (*comparison.changed, _TRAIN)
    if _is_accepted(_TRAIN, config):
        accepted = (*comparison.accepted, f"{_TRAIN}: {detail}")
        return replace(comparison, accepted=accepted, changed=changed)
    detail += (
        f"; {_EFFECTS['data']}; restore the files, or add {_TRAIN} to "
        "checkpoint.resume_changes to go on with them"
    )
    problem = Problem(_pointer(_TRAIN), "resume_change", detail)
    return replace(comparison, problems=(*comparison.problems, problem), changed=changed)


def _listed(sizes: Sequence[CorpusSize]) -> str:
    """Returns sizes of corpora in words; only the first few of many."""
    rows = [
        f"{tokens:,} tokens in {documents:,} documents"
        for tokens, documents in sizes[:_MAX_LISTED]
    ]
    if len(sizes) > _MAX_LISTED:
        rows.append("...")
    return " + ".join(rows)


def _explained_by_others(
    config: TrainConfig, saved: TrainConfig, fields: set[str]
) -> list[str]:
    """Returns fields whose difference only follows from that of another field."""
    explained = list[str]()
    if config.schedule.kind != saved.schedule.kind:
        explained += _OF_DECAY
    for field, derived in _DERIVED.items():
        if getattr(config.model, field) != getattr(saved.model, field):
            explained += [f"model.{name}" for name in derived]
    kind = config.data.tokenizer.kind
    if kind != saved.data.tokenizer.kind:
        explained.append("data.tokenizer.vocab_size")
        # A file's content is compared where it is read.
        if kind == "file":
            explained.append("data.tokenizer.kind")
    if (config.model.moe is None) != (saved.model.moe is None):
        explained.append("model.ffn_hidden_size")
        for field in fields:
            if field.startswith("model.moe.") and field != "model.moe.num_experts":
                explained.append(field)
    return explained


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
        elif _is_fixed(name):
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


def _is_within(field: str, names: tuple[str, ...]) -> bool:
    """Returns whether a field is one of those named, or inside a section named."""
    return any(field == name or field.startswith(f"{name}.") for name in names)


def _is_accepted(field: str, config: TrainConfig) -> bool:
    names = config.checkpoint.resume_changes
    if field == _STEPS:
        # The length may be given in other units.
        return any(_is_within(f"training.{length}", names) for length in LENGTHS)
    return _is_within(field, names)


def _is_fixed(field: str) -> bool:
    if _is_within(field, (*_CHANGEABLE_OF_MODEL, *FREE_ON_RESUME)):
        return False
    return _is_within(field, FIXED_ON_RESUME)


def _guarded_values(config: TrainConfig) -> dict[str, Any]:
    """Returns the values that must not change silently, by dotted field name.

    Fields that have no effect beside others are left out, so that only a change of the
    run counts as one.
    """
    sections = config.model_dump(mode="json", include=set(TrainConfig.model_fields))
    del sections["model"]
    values = {}
    for field, value in _leaves(sections, ""):
        is_guarded = _is_within(field, _GUARDED_WITHIN)
        if is_guarded or not _is_within(field, FREE_ON_RESUME):
            values[field] = value
    values.update(_model_values(config))
    values.update(_data_values(config))
    # A decay that ends with the job depends on its length, any other rate does not. The
    # order of samples never does.
    for length in LENGTHS:
        del values[f"training.{length}"]
    schedule = config.schedule
    if schedule.kind == "constant":
        for field in _OF_DECAY:
            del values[field]
    elif not schedule.length_fields("decay"):
        values[_DECAY_END] = config.training.known_steps
    if _counts_shares(config):
        values[_STEPS] = config.training.known_steps
    # One field each for users, who set it as a whole.
    for field in tuple(values):
        if _is_within(field, (_RAMPUP, _MOMENTS)):
            del values[field]
    return values | _whole_values(config)


def _whole_values(config: TrainConfig) -> dict[str, Any]:
    """Returns sections that count as one value each."""
    values: dict[str, Any] = {_RAMPUP: "no ramp-up"}
    rampup = config.training.rampup_batch_size
    if rampup is not None:
        values[_RAMPUP] = ", ".join(f"{name}={size}" for name, size in rampup)
    local_sgd = config.parallel.local_sgd
    if local_sgd is not None:
        values[_MOMENTS] = local_sgd.sync_moments_every
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


def _can_stay(config: TrainConfig) -> bool:
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


def _pointer(field: str) -> str:
    return f"/{field.replace('.', '/')}"


def _describe(field: str, value: object, saved: str) -> str:
    detail = f"{value}, but {saved}"
    if _is_fixed(field):
        return (
            f"{detail}; set it back, or start another run in another storage.path: the "
            "checkpoint's tensors depend on it"
        )
    for section, effect in _EFFECTS.items():
        if _is_within(field, (section,)):
            detail = f"{detail}, and {effect}"
            break
    return f"{detail}; set it back, or add {field} to checkpoint.resume_changes to go on with it"
