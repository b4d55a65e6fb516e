"""Checks that a run which resumes goes on as the run that wrote its checkpoint.

Pure. Must not know: files, checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation.initial_weights import is_same
from megatron_ray.validation.resume.fields import (
    DECAY_END,
    OF_DECAY,
    RAMPUP,
    STEPS,
    is_accepted,
    is_fixed,
    is_within,
)
from megatron_ray.validation.resume.values import can_stay, guarded_values

_OF_DATA = ("model.vocab_size", DECAY_END, STEPS)

_DERIVED = {
    "hidden_size": ("head_dim", "ffn_hidden_size", "moe.ffn_hidden_size"),
    "num_attention_heads": ("head_dim", "num_query_groups"),
    "ffn_hidden_size": ("moe.ffn_hidden_size",),
}
"""Fields of a model that follow from another one where they are not given."""

_EFFECTS = {
    "training.steps": "the learning rate would decay over another number of steps",
    RAMPUP: "steps would have another number of samples",
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
        return any(is_within(field, _ORDER_FIELDS) for field in self.changed)


CorpusSize = tuple[int, int]
"""Tokens and documents of a corpus to train on, which another text hardly ever has."""

_TRAIN = "data.train"
_MAX_LISTED = 4
_ORDER_FIELDS = ("data", "training.seq_length", "training.seed")


def compare(config: TrainConfig, saved: TrainConfig, origin: str) -> ResumeComparison:
    """Compares a run's config with the one that it had when it was saved.

    `origin` names the latter in messages, as in "the checkpoint X was made with".
    """
    own_values = guarded_values(config)
    saved_values = guarded_values(saved)
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
        if field == DECAY_END and config.schedule.decay_steps is None:
            name = STEPS
        if name in changed:
            continue
        changed.append(name)
        value, saved_value = _differing(value, saved_value)
        if is_fixed(name) or not is_accepted(name, config):
            detail = _describe(name, value, f"{origin} {saved_value}")
            if field == DECAY_END and name == STEPS and can_stay(config):
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
    is_explained = any(is_within(field, ("data",)) for field in comparison.changed)
    if is_explained or list(sizes) == list(saved):
        return comparison
    detail = (
        f"the files have changed: they give {_listed(sizes)} to train on, and gave "
        f"{_listed(saved)} when the run was saved"
    )
    changed = (*comparison.changed, _TRAIN)
    if is_accepted(_TRAIN, config):
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
        explained += OF_DECAY
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


def _pointer(field: str) -> str:
    return f"/{field.replace('.', '/')}"


def _describe(field: str, value: object, saved: str) -> str:
    detail = f"{value}, but {saved}"
    if is_fixed(field):
        return (
            f"{detail}; set it back, or start another run in another storage.path: the "
            "checkpoint's tensors depend on it"
        )
    for section, effect in _EFFECTS.items():
        if is_within(field, (section,)):
            detail = f"{detail}, and {effect}"
            break
    return f"{detail}; set it back, or add {field} to checkpoint.resume_changes to go on with it"
