"""What may be watched is known when a spec is read; mistakes name field and remedy."""

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_ray.config.callbacks.monitors import CallbacksConfig
from megatron_ray.config.errors.spec_problems import problems_from_pydantic
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation.check import find_problems, find_warnings
from tests.support.installed_callback import install

BASE: dict[str, Any] = {
    "model": {"preset": "gpt-tiny"},
    "data": {"train": [{"path": "builtin://python-stdlib"}]},
    "training": {"seq_length": 256, "global_batch_size": 16, "steps": 40},
    "optimizer": {"lr": 1e-3},
}


def config(callbacks: dict[str, Any], **fields: Any) -> TrainConfig:
    return TrainConfig.from_mapping(BASE | {"callbacks": callbacks} | fields)


def problems(callbacks: dict[str, Any]) -> dict[str, str]:
    body = BASE | {"callbacks": callbacks}
    with pytest.raises(ValidationError) as caught:
        TrainConfig.from_mapping(body)
    errors: Any = caught.value.errors()
    problems = problems_from_pydantic(errors, body, model=TrainConfig)
    return {problem.pointer: problem.detail for problem in problems}


def test_nothing_is_watched_by_default() -> None:
    assert TrainConfig.from_mapping(BASE).callbacks == CallbacksConfig()
    assert CallbacksConfig().intervals == {}
    spec = config({"optimizer": {}, "unigram": {"every_steps": 5}})
    assert spec.callbacks.intervals == {"optimizer": 10, "unigram": 5}
    assert find_problems(spec) == []
    assert find_warnings(spec) == []


@pytest.mark.parametrize(
    ("callbacks", "pointer", "words"),
    [
        ({"optimiser": {}}, "/callbacks/optimiser", "did you mean 'optimizer'?"),
        (
            {"optimizer": {"metrics": ["grad_nrm"]}},
            "/callbacks/optimizer/metrics/0",
            "must be 'grad_norm', 'weight_norm', 'update_norm', 'update_ratio' or "
            "'moment_norms'",
        ),
        (
            {"unigram": {"every_steps": 0}},
            "/callbacks/unigram/every_steps",
            "must be at least 1",
        ),
        (
            {"installed": {"grwth": {}}},
            "/callbacks/installed",
            "there is no callback 'grwth'; did you mean 'growth'?",
        ),
        (
            {"installed": {"broken": {}}},
            "/callbacks/installed",
            "the entry point 'package:broken' of callback 'broken' cannot be loaded: "
            "RuntimeError: a library is missing; repair or remove its package",
        ),
        (
            {"installed": {"no_kind": {}}},
            "/callbacks/installed",
            "of callback 'no_kind' is no CallbackKind",
        ),
        (
            {"installed": {"growth": {"options": {"least": "much"}}}},
            "/callbacks/installed",
            "callback 'growth' options: least must be a number",
        ),
        (
            {"installed": {"lost": {"options": {"least": 1}}}},
            "/callbacks/installed",
            "callback 'lost' has no options, got least; leave them out",
        ),
    ],
)
def test_mistakes_are_refused_when_the_spec_is_read(
    callbacks: dict[str, Any],
    pointer: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch)
    details = problems(callbacks)
    assert list(details) == [pointer]
    assert words in details[pointer]


def test_without_a_package_the_group_of_entry_points_is_named() -> None:
    (detail,) = problems({"installed": {"growth": {}}}).values()
    assert (
        "there is no callback 'growth'; no installed package has an entry point of group "
        "megatron_ray.callbacks"
    ) in detail


@pytest.mark.parametrize(
    ("monitor", "fields", "pointer", "words"),
    [
        (
            {"parameters": ["layer.0.*"]},
            {},
            "/callbacks/optimizer/parameters",
            "no parameter matches 'layer.0.*'; did you mean 'layers.*",
        ),
        (
            {"parameters": ["embedding.*"]},
            {"optimizer": {"lr": 1e-3, "freeze": ["embedding.*"]}},
            "/callbacks/optimizer/parameters",
            "all parameters that are measured are frozen by optimizer.freeze",
        ),
        (
            {"by": "parameter"},
            {
                "model": {
                    "preset": "gpt-tiny",
                    "moe": {"num_experts": 64, "top_k": 2, "ffn_hidden_size": 64},
                }
            },
            "/callbacks/optimizer/by",
            "numbers a step, at most 2048 are possible; use by=layer, fewer metrics, or "
            'fewer parameters, such as ["layers.0.*"]',
        ),
    ],
)
def test_parameters_that_cannot_be_measured_are_refused(
    monitor: dict[str, Any], fields: dict[str, Any], pointer: str, words: str
) -> None:
    (problem,) = find_problems(config({"optimizer": monitor}, **fields))
    assert problem.pointer == pointer
    assert words in problem.detail


def test_a_callback_that_is_never_due_is_noted() -> None:
    (warning,) = find_warnings(config({"activations": {"every_steps": 50}}))
    assert warning.pointer == "/callbacks/activations/every_steps"
    assert warning.detail == (
        "every_steps=50 is beyond training.steps=40: nothing is reported; lower it"
    )
