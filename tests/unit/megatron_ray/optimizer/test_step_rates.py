"""The numbers of each step against closed forms, and what switches change."""

from dataclasses import replace
from math import ceil, cos, pi, sqrt
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.optimizer.step_rates import RunRates

STEPS = 1000
BATCH = 24
SEQ_LENGTH = 10
PEAK = 0.3
MIN = 0.01
INIT = 0.02


def config(
    schedule: dict[str, Any], optimizer: dict[str, Any] | None = None, **training: Any
) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "data": {"train": [{"path": "x"}]},
            "training": {
                "seq_length": SEQ_LENGTH,
                "global_batch_size": BATCH,
                "steps": STEPS,
                **training,
            },
            "optimizer": {"lr": PEAK, **(optimizer or {})},
            "schedule": {"min_lr": MIN, "init_lr": INIT, **schedule},
        }
    )


def megatron(n: int, warmup: float, decay: int, wsd: float, kind: str, shape: str) -> float:
    """The rate after n samples; lengths are in samples."""
    if warmup > 0 and n <= warmup:
        return INIT + (PEAK - INIT) * n / warmup
    if kind == "constant":
        return PEAK
    if n > decay:
        return MIN
    if kind == "inverse_sqrt":
        return max(MIN, PEAK * sqrt(warmup) / sqrt(n))
    ratio = (n - warmup) / (decay - warmup)
    if kind == "wsd":
        ratio = (n - (decay - wsd)) / wsd
        if ratio <= 0:
            return PEAK
        kind = shape
    shapes: dict[str, float] = {
        "linear": 1 - ratio,
        "cosine": (cos(pi * ratio) + 1) / 2,
        "exponential": 2 * 0.5**ratio - 1,
        "minus_sqrt": 1 - sqrt(ratio),
    }
    return MIN + shapes[kind] * (PEAK - MIN)


KINDS = [
    ("constant", "linear"),
    ("linear", "linear"),
    ("cosine", "linear"),
    ("inverse_sqrt", "linear"),
    ("wsd", "exponential"),
    ("wsd", "linear"),
    ("wsd", "cosine"),
    ("wsd", "minus_sqrt"),
]
RAMPUP = {"start": 4, "increment": 4, "samples": 4000}


def consumed(step: int, *, rampup: bool) -> int:
    """Samples after a step, by Megatron's calculator."""
    if not rampup:
        return step * BATCH
    total = 0
    for _ in range(step):
        total += BATCH if total > 4000 else 4 + int(total / (4000 / 5)) * 4
    return total


@pytest.mark.parametrize("rampup", [False, True], ids=["constant", "ramp-up"])
@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_a_thousand_rates_equal_megatrons(kind: str, shape: str, rampup: bool) -> None:
    schedule: dict[str, Any] = {"kind": kind, "wsd_shape": shape}
    lengths = {"warmup_samples": 500, "decay_tokens": 150_003, "wsd_decay_samples": 777}
    batches = {"rampup_batch_size": RAMPUP} if rampup else {}
    rates = RunRates(config({**schedule, **lengths}, **batches))
    by_steps = {"warmup_steps": 40, "decay_steps": 900, "wsd_decay_steps": 300}
    steps = RunRates(config({**schedule, **by_steps}, **batches))
    warmup, stable, decay = (consumed(step, rampup=rampup) for step in (40, 600, 900))
    n = 0
    for step in range(1, STEPS + 1):
        n += consumed(1, rampup=False) if n > 4000 or not rampup else 4 + int(n / 800) * 4
        expected = megatron(n, 500, ceil(150_003 / SEQ_LENGTH), 777, kind, shape)
        assert rates.at(step).lr == pytest.approx(expected, rel=1e-12, abs=1e-15)
        expected = megatron(n, warmup, decay, decay - stable, kind, shape)
        assert steps.at(step).lr == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    "lengths",
    [
        {"warmup_samples": 240, "decay_samples": 19_200, "wsd_decay_samples": 4800},
        {"warmup_tokens": 2400, "decay_tokens": 192_000, "wsd_decay_tokens": 48_000},
        {"warmup_fraction": 0.01, "decay_fraction": 0.8, "wsd_decay_fraction": 0.2},
        {"warmup_samples": 240, "decay_fraction": 0.8, "wsd_decay_tokens": 48_000},
    ],
)
@pytest.mark.parametrize("kind", ["cosine", "wsd", "inverse_sqrt"])
def test_every_unit_gives_the_same_rates(kind: str, lengths: dict[str, Any]) -> None:
    rates = RunRates(config({"kind": kind, **lengths}))
    steps = {"warmup_steps": 10, "decay_steps": 800, "wsd_decay_steps": 200}
    by_steps = RunRates(config({"kind": kind, **steps}))
    for step in range(1, STEPS + 1):
        assert rates.at(step).lr == by_steps.at(step).lr, "to the bit"


# ---- weight decay


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_weight_decay_follows_its_schedule(kind: str) -> None:
    schedule = {"kind": kind, "end": 0.5}
    optimizer = {"weight_decay": 0.1, "weight_decay_schedule": schedule}
    rates = RunRates(config({}, optimizer))
    grown = RunRates(config({}, optimizer, rampup_batch_size=RAMPUP))
    total = consumed(STEPS, rampup=True)
    assert rates.varies
    for step in range(1, STEPS + 1):
        ratio = step / STEPS
        if kind == "cosine":
            ratio = 0.5 * (cos(pi * (1 - ratio)) + 1)
        assert rates.at(step).numbers["weight_decay"] == pytest.approx(0.1 + 0.4 * ratio)
    ratio = consumed(300, rampup=True) / total
    if kind == "cosine":
        ratio = 0.5 * (cos(pi * (1 - ratio)) + 1)
    assert grown.at(300).numbers["weight_decay"] == pytest.approx(0.1 + 0.4 * ratio)
    assert grown.at(STEPS).numbers == {"weight_decay": 0.5}
    assert grown.at(STEPS).weight_decay == 0.5


def test_without_schedules_and_switches_nothing_varies() -> None:
    rates = RunRates(config({}, {"weight_decay": 0.1}))
    assert not rates.varies
    assert rates.at(5).numbers == {}
    assert rates.at(5).weight_decay is None
    assert rates.at(5).clip_grad_norm == 1.0


# ---- switches


def test_a_switch_sets_numbers_and_the_schedule_goes_on() -> None:
    switches = [
        {"step": 101, "lr": PEAK / 2, "beta2": 0.9},
        {"step": 201, "weight_decay": 0.4, "clip_grad_norm": 0.5},
    ]
    rates = RunRates(config({"kind": "linear", "min_lr": 0}, {"switches": switches}))
    plain = RunRates(config({"kind": "linear", "min_lr": 0}))
    for step in (1, 100):
        assert rates.at(step) == replace(plain.at(step), weight_decay=0.0)
    for step in (101, 1000):
        assert rates.at(step).lr == pytest.approx(plain.at(step).lr / 2)
        assert rates.at(step).peak_lr == PEAK / 2
    assert rates.at(200).numbers == {"beta2": 0.9}
    assert rates.at(201).numbers == {"beta2": 0.9, "weight_decay": 0.4}
    assert [rates.at(step).weight_decay for step in (200, 201)] == [0.0, 0.4]
    assert (rates.at(200).clip_grad_norm, rates.at(201).clip_grad_norm) == (1.0, 0.5)


@pytest.mark.parametrize("rampup", [False, True], ids=["constant", "ramp-up"])
def test_another_schedule_counts_from_its_switch(rampup: bool) -> None:
    later = {"kind": "linear", "warmup_steps": 20, "min_lr": MIN}
    switches = [{"step": 301, "schedule": later}, {"step": 951, "lr": PEAK / 3}]
    batches = {"rampup_batch_size": RAMPUP} if rampup else {}
    rates = RunRates(config({"kind": "constant"}, {"switches": switches}, **batches))
    before, warm, last = (consumed(step, rampup=rampup) for step in (300, 320, STEPS))
    assert rates.at(300).lr == PEAK
    for step in range(301, STEPS + 1, 13):
        n = consumed(step, rampup=rampup)
        peak = PEAK if step < 951 else PEAK / 3
        expected = MIN + (peak - MIN) * (last - n) / (last - warm)
        if step <= 320:
            expected = peak * (n - before) / (warm - before)
        assert rates.at(step).lr == pytest.approx(expected)
    assert rates.at(STEPS).lr == pytest.approx(MIN)


def test_shares_of_another_schedule_are_of_the_steps_that_are_left() -> None:
    switch = {"step": 501, "schedule": {"kind": "constant", "warmup_fraction": 0.1}}
    rates = RunRates(config({"kind": "constant"}, {"switches": [switch]}))
    assert rates.at(500).lr == PEAK
    assert [rates.at(step).lr for step in (525, 550, 551)] == [PEAK / 2, PEAK, PEAK]


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (
            {"switches": [{"step": 9, "lr": 1}, {"step": 9, "lr": 2}]},
            "have steps 9 and 9; list them in the order of their steps, each step once",
        ),
        ({"switches": [{"step": 9}]}, "step 9 changes nothing; give it a number"),
        (
            {"name": "sgd", "switches": [{"step": 9, "beta1": 0.5}]},
            "the switch of step 9 sets beta1, which sgd does not use; leave it out",
        ),
        (
            {"name": "sgd", "momentum": 0, "switches": [{"step": 9, "momentum": 0.5}]},
            "no state with momentum=0; begin with a momentum above 0",
        ),
        (
            {
                "weight_decay_schedule": {"end": 1},
                "switches": [{"step": 9, "weight_decay": 0.5}],
            },
            "which follows weight_decay_schedule; leave one of them out",
        ),
        ({"switches": [{"step": 1, "lr": 1}]}, "greater than or equal to 2"),
    ],
)
def test_a_switch_that_cannot_be_is_refused_when_read(
    optimizer: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        OptimizerConfig.model_validate({"lr": 0.1, **optimizer})
