"""Which fields may change on a resume, and what is refused."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation.check import find_problems
from megatron_ray.validation.resume import comparison, fields

SAVED: dict[str, Any] = {
    "model": {"preset": "gpt-tiny"},
    "data": {"train": [{"path": "/a.txt"}], "tokenizer": {"kind": "bytes"}},
    "training": {"seq_length": 64, "global_batch_size": 8, "steps": 20},
    "optimizer": {"lr": 1e-3},
}


def config(**changes: Any) -> TrainConfig:
    """A config with `section__field=value` changed."""
    values = {name: dict(section) for name, section in SAVED.items()}
    for name, value in changes.items():
        section, _, field = name.partition("__")
        values.setdefault(section, {})[field] = value
    return TrainConfig.from_mapping(values)


def compare(
    new: dict[str, Any], old: dict[str, Any] | None = None
) -> comparison.ResumeComparison:
    origin = "the checkpoint /c/step-20 was made with"
    return comparison.compare(config(**new), config(**(old or {})), origin)


def pointers(new: dict[str, Any], old: dict[str, Any] | None = None) -> list[str]:
    return [problem.pointer for problem in compare(new, old).problems]


FREE: list[dict[str, Any]] = [
    {"parallel__tp": 2, "parallel__dp": 2, "parallel__zero": 3},
    {"training__micro_batch_size": 4},
    {"training__recompute": {"granularity": "selective"}},
    {"training__compile": "blocks"},
    {"training__deterministic": True},
    {"training__eval_every_steps": 5, "training__eval_samples": 7},
    {"checkpoint__every_steps": 7, "checkpoint__keep_last": 5, "checkpoint__mode": "sync"},
    {"checkpoint__start_from": "/weights"},
    {"storage__path": "/moved"},
    {"data__cache": "/elsewhere"},
    {"data__train": [{"path": "/a.txt", "max_bad_records": 3}]},
    {"training__skip_steps": [21], "training__max_skipped_steps": 2},
    {"training__profile": {"steps": "3-4"}},
    {"model__init_std": 0.5},
    {"model__vocab_multiple": 64},
    {"model__max_sequence_length": 512},
    # The same values as the preset's and the defaults', written out.
    {"model__vocab_size": None, "schedule__kind": "cosine", "schedule__decay_steps": 20},
]


@pytest.mark.parametrize("changes", FREE)
def test_how_a_run_is_executed_may_change(changes: dict[str, Any]) -> None:
    result = compare(changes)
    assert result == comparison.ResumeComparison((), (), ())


GUARDED: list[tuple[dict[str, Any], str]] = [
    ({"training__steps": 40}, "training.steps"),
    ({"training__steps": 10}, "training.steps"),
    ({"training__global_batch_size": 16}, "training.global_batch_size"),
    ({"training__seq_length": 32}, "training.seq_length"),
    ({"training__seed": 5}, "training.seed"),
    ({"training__precision": "bf16"}, "training.precision"),
    ({"optimizer__lr": 0.1}, "optimizer.lr"),
    ({"optimizer__weight_decay": 0.1}, "optimizer.weight_decay"),
    ({"optimizer__clip_grad_norm": 0.5}, "optimizer.clip_grad_norm"),
    ({"schedule__warmup_steps": 5}, "schedule.warmup_steps"),
    ({"schedule__warmup_tokens": 5120}, "schedule.warmup_tokens"),
    ({"schedule__decay_samples": 300}, "schedule.decay_samples"),
    (
        {"training__rampup_batch_size": {"start": 4, "increment": 4, "samples": 80}},
        "training.rampup_batch_size",
    ),
    ({"optimizer__switches": [{"step": 9, "lr": 0.1}]}, "optimizer.switches"),
    ({"schedule__min_lr": 1e-4}, "schedule.min_lr"),
    ({"schedule__kind": "constant"}, "schedule.kind"),
    ({"schedule__decay_steps": 30}, "schedule.decay_steps"),
    ({"data__train": [{"path": "/b.txt"}]}, "data.train"),
    ({"data__validation_fraction": 0.5}, "data.validation_fraction"),
    ({"data__separate_documents": True}, "data.separate_documents"),
    ({"model__hidden_dropout": 0.1}, "model.hidden_dropout"),
    ({"model__rope_theta": 5e5}, "model.rope_theta"),
    ({"model__norm_eps": 1e-6}, "model.norm_eps"),
]


@pytest.mark.parametrize(("changes", "field"), GUARDED, ids=[row[1] for row in GUARDED])
def test_what_changes_the_run_is_refused_unless_it_is_named(
    changes: dict[str, Any], field: str
) -> None:
    (problem,) = compare(changes).problems
    assert problem.pointer == f"/{field.replace('.', '/')}"
    assert "but the checkpoint /c/step-20 was made with" in problem.detail
    assert f"add {field} to checkpoint.resume_changes" in problem.detail
    # The remedy leads to a run, and so does naming the section.
    for name in (field, field.partition(".")[0]):
        named = {**changes, "checkpoint__resume_changes": [name]}
        if name != "model":
            assert find_problems(config(**named)) == []
        result = compare(named)
        assert result.problems == ()
        (line,) = result.accepted
        assert line.startswith(f"{field} is ")
    assert pointers({**changes, "checkpoint__resume_changes": ["optimizer.eps"]})


FIXED: list[dict[str, Any]] = [
    {"model__hidden_size": 256},
    {"model__activation": "gelu"},
    {"model__tie_embeddings": True},
    {"model__moe": {"num_experts": 4}},
    {"optimizer__freeze": ["embedding.weight"]},
    {"data__tokenizer": {"kind": "bpe", "vocab_size": 300}},
]


@pytest.mark.parametrize("changes", FIXED)
def test_what_the_tensors_depend_on_cannot_change(changes: dict[str, Any]) -> None:
    names = ["model", "optimizer", "data", "training"]
    for problem in compare({**changes, "checkpoint__resume_changes": names}).problems:
        assert problem.detail.endswith("the checkpoint's tensors depend on it")
    assert compare({**changes, "checkpoint__resume_changes": names}).problems


def test_a_message_names_both_values_the_effect_and_the_remedies() -> None:
    (problem,) = compare({"training__steps": 40}).problems
    assert problem.detail == (
        "40, but the checkpoint /c/step-20 was made with 20, and the learning rate would decay "
        "over another number of steps; set it back, or add training.steps to "
        "checkpoint.resume_changes to go on with it"
    )
    floor = {"schedule__min_lr": 1e-4}
    (problem,) = compare({"training__steps": 40, **floor}, floor).problems
    assert problem.detail.endswith(", or set schedule.decay_steps to 20 to stay at min_lr")
    remedied = {"training__steps": 40, "schedule__decay_steps": 20, **floor}
    assert compare(remedied, floor).problems == ()
    assert find_problems(config(**remedied)) == []


def test_of_long_lists_only_what_differs_is_named() -> None:
    old = {"data__train": [{"path": f"/{number}.txt"} for number in range(9)]}
    new = {"data__train": [*old["data__train"][:8], {"path": "/8.txt", "weight": 3}]}
    (problem,) = compare(new, old).problems
    assert problem.detail.startswith(
        "weight 3.0 in entry 8, but the checkpoint /c/step-20 was made with weight 1.0, and "
    )
    (problem,) = compare({}, old).problems
    assert problem.detail.startswith("a list of 1, but the checkpoint /c/step-20 was made")
    assert "with a list of 9, and" in problem.detail


def test_a_tokenizer_may_be_named_as_a_file_which_is_compared_where_it_is_read() -> None:
    file = {"data__tokenizer": {"kind": "file", "path": "/c/tokenizer.json"}}
    bpe = {"data__tokenizer": {"kind": "bpe", "vocab_size": 300}}
    assert pointers(file, bpe) == []
    assert pointers(file) == []
    assert pointers(bpe, file) == ["/data/tokenizer/kind"]
    assert pointers({}, bpe) == ["/data/tokenizer/kind"]


def test_more_steps_are_free_where_the_rate_does_not_depend_on_them() -> None:
    for schedule in ({"schedule__kind": "constant"}, {"schedule__decay_steps": 20}):
        assert pointers({"training__steps": 40, **schedule}, schedule) == []


def test_more_steps_are_named_where_shares_depend_on_them() -> None:
    constant = {"schedule__kind": "constant"}
    for old in (
        {**constant, "schedule__warmup_fraction": 0.1},
        {"schedule__decay_fraction": 0.5, "schedule__min_lr": 1e-4},
        {**constant, "optimizer__weight_decay_schedule": {"end": 0.1}},
        {**constant, "optimizer__switches": [{"step": 9, "schedule": {"kind": "linear"}}]},
        {"optimizer__weight_decay_schedule": {"end": 0.1}, "schedule__min_lr": 1e-4},
    ):
        (problem,) = compare({"training__steps": 40, **old}, old).problems
        assert problem.pointer == "/training/steps"
        # Staying at min_lr would not be enough.
        assert "schedule.decay_steps" not in problem.detail
        named = {"training__steps": 40, "checkpoint__resume_changes": ["training.steps"]}
        assert pointers({**named, **old}, old) == []
        assert pointers(old, old) == []


def test_a_ramp_up_is_one_field() -> None:
    old = {"training__rampup_batch_size": {"start": 4, "increment": 4, "samples": 80}}
    new = {"training__rampup_batch_size": {"start": 2, "increment": 2, "samples": 80}}
    (problem,) = compare(new, old).problems
    assert problem.detail == (
        "start=2, increment=2, samples=80, but the checkpoint /c/step-20 was made with "
        "start=4, increment=4, samples=80, and steps would have another number of samples; "
        "set it back, or add training.rampup_batch_size to checkpoint.resume_changes to go "
        "on with it"
    )


def test_other_validation_sources_are_free_but_holding_out_other_documents_is_not() -> None:
    old = {"data__validation": [{"path": "/v.txt"}]}
    assert pointers({"data__validation": [{"path": "/w.txt"}]}, old) == []
    assert pointers({**old, "data__validation_fraction": 0.5}, old) == []
    assert "/data/validation" in pointers({}, old)


def test_only_what_concerns_samples_changes_their_order() -> None:
    names = ["training", "data", "optimizer"]
    for change in ({"training__seed": 2}, {"data__train": [{"path": "/b"}]}):
        assert compare({**change, "checkpoint__resume_changes": names}).changes_order
    for other in ({"training__steps": 40}, {"optimizer__lr": 0.1}):
        assert not compare({**other, "checkpoint__resume_changes": names}).changes_order


def test_names_of_fields_that_do_not_exist_or_cannot_change_are_refused() -> None:
    names = ["training.step", "schedule", "model.hidden_size", "x"]
    problems = find_problems(config(checkpoint__resume_changes=names))
    assert [problem.pointer for problem in problems] == [
        "/checkpoint/resume_changes/0",
        "/checkpoint/resume_changes/2",
        "/checkpoint/resume_changes/3",
    ]
    assert "did you mean training.steps?" in problems[0].detail
    assert "model.hidden_size cannot change on a resume" in problems[1].detail


def test_every_field_that_the_tables_name_exists() -> None:
    known = set(fields._field_names(TrainConfig, ""))
    tables = (*fields.FREE_ON_RESUME, *fields.FIXED_ON_RESUME, *fields.CHANGEABLE_OF_MODEL)
    assert set(tables) <= known
    # The field's own documentation lists what is free.
    description = TrainConfig.model_fields["checkpoint"].annotation
    assert description is not None
    text = description.model_fields["resume_changes"].description
    for name in fields.FREE_ON_RESUME:
        section, _, leaf = name.partition(".")
        if section != "model":
            assert (leaf or section) in text
