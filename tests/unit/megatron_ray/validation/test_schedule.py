"""Numbers of a schedule that contradict each other, or have no effect."""

from typing import Any

import pytest

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.validation.schedule import schedule_problems, schedule_warnings


def config(**schedule: Any) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "data": {"train": [{"path": "x"}]},
            "training": {"seq_length": 8, "global_batch_size": 8, "steps": 100},
            "optimizer": {"lr": 0.1},
            "schedule": {"min_lr": 0.01, **schedule},
        }
    )


@pytest.mark.parametrize(
    ("schedule", "pointer", "words"),
    [
        ({"init_lr": 0.2}, "/schedule/init_lr", "init_lr=0.2 is above optimizer.lr=0.1"),
        (
            {"kind": "wsd", "warmup_steps": 10, "wsd_decay_steps": 91},
            "/schedule/wsd_decay_steps",
            "wsd_decay_steps=91 is more than the 90 steps between warmup_steps=10 and the end "
            "of the decay in step 100; make it at most 90",
        ),
        (
            {"kind": "wsd", "warmup_steps": 95},
            "/schedule/wsd_decay_steps",
            "wsd_decay_steps=10 is more than the 5 steps between",
        ),
        (
            {"kind": "wsd", "min_lr": 0, "decay_steps": 50},
            "/schedule/decay_steps",
            "leaves a rate of 0 for 51 of training.steps=100",
        ),
        (
            {"kind": "inverse_sqrt", "min_lr": 0, "decay_steps": 50},
            "/schedule/decay_steps",
            "leaves a rate of 0 for 50 of training.steps=100",
        ),
    ],
)
def test_contradictions_are_refused(
    schedule: dict[str, Any], pointer: str, words: str
) -> None:
    (problem,) = schedule_problems(config(**schedule))
    assert problem.pointer == pointer
    assert words in problem.detail


@pytest.mark.parametrize(
    "schedule",
    [
        {"kind": "wsd", "warmup_steps": 10, "wsd_decay_steps": 90},
        {"kind": "inverse_sqrt", "min_lr": 0, "warmup_steps": 10},
        {"warmup_steps": 5, "init_lr": 0.1},
    ],
)
def test_what_can_run_is_not_refused(schedule: dict[str, Any]) -> None:
    assert schedule_problems(config(**schedule)) == []


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"init_lr": 0.01}, "init_lr=0.01 has no effect without warmup_steps"),
        ({"wsd_decay_steps": 9}, "wsd_decay_steps=9 has no effect with kind=cosine"),
        (
            {"kind": "constant", "min_lr": 0, "wsd_shape": "cosine"},
            "wsd_shape=cosine has no effect with kind=constant",
        ),
    ],
)
def test_what_has_no_effect_is_noted(schedule: dict[str, Any], words: str) -> None:
    assert words in [warning.detail for warning in schedule_warnings(config(**schedule))]


# ---- lengths in other units


@pytest.mark.parametrize(
    ("schedule", "pointer", "words"),
    [
        (
            {"warmup_steps": 5, "warmup_tokens": 640},
            "/schedule/warmup_tokens",
            "only one of warmup_steps, warmup_tokens may be given; leave out warmup_tokens",
        ),
        (
            {"decay_samples": 9, "decay_tokens": 9, "decay_fraction": 0.5},
            "/schedule/decay_tokens",
            "leave out decay_tokens and decay_fraction",
        ),
        (
            {"warmup_fraction": 0.5, "decay_samples": 399},
            "/schedule/decay_samples",
            "decay_samples=399 is not after warmup_fraction=0.5, so the rate would drop",
        ),
        (
            {"kind": "wsd", "warmup_fraction": 0.5, "wsd_decay_tokens": 3264},
            "/schedule/wsd_decay_tokens",
            "wsd_decay_tokens=3264 is more than the 3200 tokens between warmup_fraction=0.5 "
            "and the end of the decay in step 100; make it at most 3200",
        ),
        (
            {"kind": "wsd", "warmup_steps": 20, "wsd_decay_fraction": 0.9},
            "/schedule/wsd_decay_fraction",
            "wsd_decay_fraction=0.9 is more than the 0.8 of the run between warmup_steps=20",
        ),
        (
            {"min_lr": 0, "decay_tokens": 3200},
            "/schedule/decay_tokens",
            "decay_tokens=3200 with min_lr=0 leaves a rate of 0 for 51 of "
            "training.steps=100; set min_lr above 0, leave decay_tokens out, or lower steps "
            "to 50",
        ),
        (
            {"warmup_tokens": 9_000_000, "decay_tokens": 8_000_000},
            "/schedule/decay_tokens",
            "decay_tokens=8000000 is not after warmup_tokens=9000000",
        ),
        (
            {"min_lr": 0, "decay_fraction": 0.5},
            "/schedule/decay_fraction",
            "decay_fraction=0.5 with min_lr=0 leaves a rate of 0 for 51",
        ),
    ],
)
def test_every_unit_is_checked(schedule: dict[str, Any], pointer: str, words: str) -> None:
    (problem,) = schedule_problems(config(**schedule))
    assert problem.pointer == pointer
    assert words in problem.detail


def test_the_remedies_of_other_units_can_run() -> None:
    for schedule in (
        {"kind": "wsd", "warmup_fraction": 0.5, "wsd_decay_tokens": 3200},
        {"kind": "wsd", "warmup_steps": 20, "wsd_decay_fraction": 0.8},
        {"warmup_steps": 0, "warmup_tokens": 640},
        {"warmup_fraction": 0.5, "decay_samples": 401},
    ):
        assert schedule_problems(config(**schedule)) == []


def test_shares_of_unknown_steps_are_checked_once_they_are_known() -> None:
    for schedule in (
        {"warmup_fraction": 0.5, "decay_fraction": 0.2},
        {"kind": "wsd", "decay_steps": 50, "wsd_decay_fraction": 0.6},
    ):
        known = config(**schedule)
        training = known.training.model_copy(update={"steps": None, "epochs": 2.0})
        assert schedule_problems(known.model_copy(update={"training": training})) == []
        assert schedule_problems(known) != []


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (
            {"warmup_tokens": 6400},
            "warmup_tokens=6400 is not shorter than training.steps=100: the rate only climbs, "
            "to 0.1 in the last step (optimizer.lr=0.1)",
        ),
        (
            {"decay_samples": 801},
            "decay_samples=801 is beyond training.steps=100: the rate does not come down to "
            "min_lr=0.01",
        ),
        (
            {"wsd_decay_fraction": 0.5},
            "wsd_decay_fraction=0.5 has no effect with kind=cosine",
        ),
        (
            {"kind": "constant", "min_lr": 0, "decay_fraction": 0.5},
            "decay_fraction=0.5 has no effect with kind=constant, which does not decay",
        ),
    ],
)
def test_other_units_without_effect_are_noted(schedule: dict[str, Any], words: str) -> None:
    assert words in [warning.detail for warning in schedule_warnings(config(**schedule))]


# ---- switches, weight decay


def with_optimizer(schedule: dict[str, Any], **optimizer: Any) -> TrainConfig:
    plain = config(**schedule).model_dump()
    return TrainConfig.from_mapping({**plain, "optimizer": {"lr": 0.1, **optimizer}})


@pytest.mark.parametrize(
    ("schedule", "switches", "pointer", "words"),
    [
        (
            {},
            [{"step": 9, "lr": 0.001}],
            "/schedule/min_lr",
            "min_lr=0.01 is above optimizer.switches.0.lr=0.001; lower it",
        ),
        (
            {},
            [{"step": 9, "schedule": {"init_lr": 0.5}}],
            "/optimizer/switches/0/schedule/init_lr",
            "init_lr=0.5 is above optimizer.lr=0.1; lower it",
        ),
        (
            {"min_lr": 0, "decay_steps": 40},
            [{"step": 81, "schedule": {"kind": "constant"}}],
            "/schedule/decay_steps",
            "leaves a rate of 0 for 41 of training.steps=100; set min_lr above 0, leave "
            "decay_steps out, or switch in step 41",
        ),
        (
            {},
            [{"step": 51, "schedule": {"decay_steps": 10, "warmup_samples": 8}}],
            "/optimizer/switches/0/schedule/decay_steps",
            "decay_steps=10 with min_lr=0 leaves a rate of 0 for 41 of training.steps=100; "
            "set min_lr above 0, leave decay_steps out, or lower steps to 60",
        ),
    ],
)
def test_contradictions_of_a_switch_are_refused(
    schedule: dict[str, Any], switches: list[Any], pointer: str, words: str
) -> None:
    (problem,) = schedule_problems(with_optimizer(schedule, switches=switches))
    assert problem.pointer == pointer
    assert words in problem.detail


def test_a_switch_can_follow_the_end_of_a_decay() -> None:
    switches = [{"step": 41, "schedule": {"kind": "constant", "warmup_steps": 5}}]
    # Or it cuts the decay off.
    for decay_steps in (40, 90):
        schedule = {"min_lr": 0, "decay_steps": decay_steps}
        switched = with_optimizer(schedule, switches=switches)
        assert schedule_problems(switched) == []
        assert schedule_warnings(switched) == []


@pytest.mark.parametrize(
    ("optimizer", "pointer", "words"),
    [
        (
            {"switches": [{"step": 101, "lr": 0.05}]},
            "/optimizer/switches/0/step",
            "step=101 is beyond training.steps=100, so nothing switches",
        ),
        (
            {"switches": [{"step": 9, "schedule": {"min_lr": 0.01, "warmup_steps": 95}}]},
            "/optimizer/switches/0/schedule/warmup_steps",
            "warmup_steps=95 is not shorter than the 92 steps from the switch on",
        ),
        (
            {"switches": [{"step": 51, "lr": 1e-11}]},
            "/optimizer/switches/0/lr",
            "lr=1e-11 is too small",
        ),
        (
            {"weight_decay": 0.1, "weight_decay_schedule": {"end": 0.1}},
            "/optimizer/weight_decay_schedule/end",
            "end=0.1 equals optimizer.weight_decay, so the decay does not change",
        ),
    ],
)
def test_switches_without_effect_are_noted(
    optimizer: dict[str, Any], pointer: str, words: str
) -> None:
    (warning,) = schedule_warnings(
        with_optimizer({"kind": "constant", "min_lr": 0}, **optimizer)
    )
    assert warning.pointer == pointer
    assert words in warning.detail
