"""Every optimizer against its paper's rule, written out in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.config.optimizer_kinds import BUILT_IN, optimizer_kind, state_dtype
from megatron_ray.optimizer.update_calls import RunTensors, UpdateCall, update_call
from megatron_ray.optimizer.update_rule import UpdateRule

Array = npt.NDArray[np.float64]
Step = Callable[[int, Array, Array, float], Array]
STEPS = 100
SIZE = 37
PEAK = 0.02
MOMENTS = ({"beta": 0.5, "weight": 0.3}, {"beta": 0.99, "weight": 0.6})
CPU = torch.device("cpu")


def lr_of(step: int) -> float:
    """A rate that falls from its peak."""
    return PEAK * (1 - 0.5 * step / STEPS)


# ---- definitions, update t = 1, 2, ... of weights w with gradient g


def adam(b2: float, eps: float, moments: list[tuple[float, float]]) -> Step:
    v = np.zeros(SIZE)
    averages = [np.zeros(SIZE) for _ in moments]

    def step(t: int, w: Array, g: Array, lr: float) -> Array:
        v[:] = b2 * v + (1 - b2) * g**2
        update = g * (1 - sum(share for _, share in moments))
        for m, (beta, share) in zip(averages, moments, strict=True):
            m[:] = beta * m + (1 - beta) * g
            update = update + share * m / (1 - beta**t)
        return w - lr * update / (np.sqrt(v / (1 - b2**t)) + eps)

    return step


def adopt(b2: float, eps: float, moments: list[tuple[float, float]]) -> Step:
    v = np.zeros(SIZE)
    averages = [np.zeros(SIZE) for _ in moments]

    def step(t: int, w: Array, g: Array, lr: float) -> Array:
        if t == 1:
            v[:] = g**2
            return w
        limit = (t - 1) ** 0.25
        normalised = np.clip(g / np.maximum(np.sqrt(v), eps), -limit, limit)
        update = normalised * (1 - sum(share for _, share in moments))
        for m, (beta, share) in zip(averages, moments, strict=True):
            m[:] = beta * m + (1 - beta) * normalised
            update = update + share * m
        v[:] = b2 * v + (1 - b2) * g**2
        return w - lr * update

    return step


def sgd(momentum: float, *, nesterov: bool) -> Step:
    buffer = np.zeros(SIZE)

    def step(t: int, w: Array, g: Array, lr: float) -> Array:
        buffer[:] = momentum * buffer + g
        return w - lr * (g + momentum * buffer if nesterov else buffer)

    return step


MANY = [(0.5, 0.3), (0.99, 0.6)]
CASES: dict[str, tuple[dict[str, Any], Callable[[], Step]]] = {
    "adamw": ({}, lambda: adam(0.95, 1e-8, [(0.9, 1.0)])),
    "decoupled_adamw": ({}, lambda: adam(0.95, 1e-8, [(0.9, 1.0)])),
    # Of what is no matrix; those are in test_matrix_update.py.
    "muon": ({}, lambda: adam(0.95, 1e-8, [(0.9, 1.0)])),
    "sgd": ({}, lambda: sgd(0.9, nesterov=False)),
    "sgd-nesterov": ({"nesterov": True}, lambda: sgd(0.9, nesterov=True)),
    "sgd-plain": ({"momentum": 0.0}, lambda: sgd(0.0, nesterov=False)),
    "adopt": ({}, lambda: adopt(0.9999, 1e-6, [(0.9, 1.0)])),
    "qhadamw": ({}, lambda: adam(0.95, 1e-8, [(0.9, 0.7)])),
    "qhadopt": ({}, lambda: adopt(0.9999, 1e-6, [(0.999, 0.9)])),
    "aggmo_adamw": ({"aggregated": MOMENTS}, lambda: adam(0.95, 1e-8, MANY)),
    "aggmo_adopt": ({"aggregated": MOMENTS}, lambda: adopt(0.9999, 1e-6, MANY)),
}


def decayed(step: Step, decay: str, weight_decay: float) -> Step:
    """Adds weight decay to a rule."""

    def with_decay(t: int, w: Array, g: Array, lr: float) -> Array:
        if decay == "l2":
            return step(t, w, g + weight_decay * w, lr)
        share = lr * weight_decay
        if decay == "schedule":
            share = lr / PEAK * weight_decay
        moved = step(t, w, g, lr)
        # ADOPT's first update leaves the weights as they are.
        return moved - share * w if not np.array_equal(moved, w) else moved

    return with_decay


def make(config: OptimizerConfig) -> tuple[RunTensors, UpdateCall]:
    state = {}
    for name in optimizer_kind(config.name).state(config):
        is_short = state_dtype(config, name) == "bf16"
        dtype = torch.bfloat16 if is_short else torch.float64
        state[name] = torch.zeros(SIZE, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(SIZE, dtype=torch.float64, generator=generator)
    run = RunTensors(weights, torch.zeros_like(weights), state)
    call = update_call(config, UpdateRule.of(config), CPU)
    call.add(run)
    return run, call


def gradients() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(STEPS, SIZE, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("decay", [None, "lr", "schedule", "l2"])
@pytest.mark.parametrize("case", CASES)
def test_updates_equal_the_definition(case: str, decay: str | None) -> None:
    numbers, definition = CASES[case]
    if decay is not None:
        numbers = {**numbers, "decay": decay, "weight_decay": 0.1}
    name = case.split("-")[0]
    config = OptimizerConfig.model_validate({"name": name, "lr": PEAK, **numbers})
    run, call = make(config)
    step = decayed(definition(), decay or "lr", config.weight_decay)
    expected = run.weights.numpy().copy()
    for t, gradient in enumerate(gradients(), 1):
        run.gradient.copy_(gradient)
        call.step(lr_of(t), None)
        expected = step(t, expected, gradient.numpy(), lr_of(t))
        np.testing.assert_allclose(run.weights.numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("decay", ["lr", "schedule", "l2"])
@pytest.mark.parametrize("case", CASES)
def test_weight_decay_may_change_from_step_to_step(case: str, decay: str) -> None:
    numbers, definition = CASES[case]
    config = OptimizerConfig.model_validate(
        {
            "name": case.split("-")[0],
            "lr": PEAK,
            "decay": decay,
            "weight_decay_schedule": {"end": 0.5},
            **numbers,
        }
    )
    run, call = make(config)
    step = definition()
    expected = run.weights.numpy().copy()
    for t, gradient in enumerate(gradients()[:20], 1):
        run.gradient.copy_(gradient)
        # The first step has none.
        weight_decay = 0.02 * (t - 1)
        call.set_numbers(PEAK, {"weight_decay": weight_decay})
        call.step(lr_of(t), None)
        now = decayed(step, decay, weight_decay)
        expected = now(t, expected, gradient.numpy(), lr_of(t))
        np.testing.assert_allclose(run.weights.numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", BUILT_IN)
def test_switched_numbers_are_those_of_another_config(name: str) -> None:
    other: dict[str, float] = {"weight_decay": 0.3}
    for number, value in (("beta1", 0.5), ("beta2", 0.6), ("momentum", 0.4), ("nu", 0.1)):
        if number in optimizer_kind(name).numbers:
            other[number] = value
    switch = {"step": 4, **other}
    base = {"name": name, "lr": PEAK, "weight_decay": 0.1, "decay": "schedule"}
    switched, call = make(OptimizerConfig.model_validate({**base, "switches": [switch]}))
    plain, plain_call = make(OptimizerConfig.model_validate(base))
    later, later_call = make(
        OptimizerConfig.model_validate({**base, **other, "lr": PEAK / 2})
    )
    for t, gradient in enumerate(gradients()[:8], 1):
        if t == 4:
            assert torch.equal(switched.weights, plain.weights)
            call.set_numbers(PEAK / 2, other)
            later.weights.copy_(switched.weights)
            for key, tensor in switched.state.items():
                later.state[key].copy_(tensor)
            later_call.set_steps_taken(3)
        for one, update in ((switched, call), (plain, plain_call), (later, later_call)):
            one.gradient.copy_(gradient)
            update.step(lr_of(t), None)
    assert torch.equal(switched.weights, later.weights)
    assert not torch.equal(switched.weights, plain.weights)


def test_every_optimizer_has_a_definition_here() -> None:
    assert {case.split("-")[0] for case in CASES} == set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_skipped_step_changes_nothing_and_does_not_count(name: str) -> None:
    config = OptimizerConfig(name=name, lr=PEAK, weight_decay=0.1)
    run, call = make(config)
    other, undisturbed = make(config)
    for t, gradient in enumerate(gradients()[:6], 1):
        for one, update in ((run, call), (other, undisturbed)):
            one.gradient.copy_(gradient)
            update.step(lr_of(t), torch.zeros(()))
        before = {key: value.clone() for key, value in run.state.items()}
        weights = run.weights.clone()
        run.gradient.fill_(torch.nan)
        call.step(lr_of(t), torch.ones(()))
        assert torch.equal(run.weights, weights)
        assert all(torch.equal(run.state[key], value) for key, value in before.items())
    assert torch.equal(run.weights, other.weights)


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_update_goes_on_from_its_count(name: str) -> None:
    config = OptimizerConfig(name=name, lr=PEAK, weight_decay=0.1)
    whole, call = make(config)
    resumed, resumed_call = make(config)
    for t, gradient in enumerate(gradients()[:8], 1):
        if t == 5:
            resumed.weights.copy_(whole.weights)
            for key, value in whole.state.items():
                resumed.state[key].copy_(value)
            resumed_call.set_steps_taken(4)
        for one, update in ((whole, call), (resumed, resumed_call)):
            one.gradient.copy_(gradient)
            update.step(lr_of(t), None)
    assert torch.equal(whole.weights, resumed.weights)


def test_large_runs_are_updated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimizerConfig(name="adopt", lr=PEAK, weight_decay=0.1)
    whole, call = make(config)
    monkeypatch.setattr("megatron_ray.optimizer.update_calls._CHUNK", 5)
    parts, parts_call = make(config)
    for t, gradient in enumerate(gradients()[:5], 1):
        for one, update in ((whole, call), (parts, parts_call)):
            one.gradient.copy_(gradient)
            update.step(lr_of(t), None)
    assert torch.equal(whole.weights, parts.weights)


SHORT = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


@pytest.mark.parametrize("short", [SHORT, {"exp_avg_dtype": "bf16"}], ids=["both", "first"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_short_moments_are_rounded_after_each_update(
    name: str, short: dict[str, str]
) -> None:
    config = OptimizerConfig.model_validate({"name": name, "lr": PEAK, **short})
    run, call = make(config)
    generator = torch.Generator().manual_seed(1)
    # The same rule, whose state is rounded here.
    weights = torch.randn(SIZE, dtype=torch.float64, generator=generator)
    assert torch.equal(weights, run.weights)
    expected = RunTensors(
        weights,
        torch.zeros_like(weights),
        {key: torch.zeros(SIZE, dtype=torch.float64) for key in run.state},
    )
    by_definition = update_call(config, UpdateRule.of(config), CPU)
    by_definition.add(expected)
    for t, gradient in enumerate(gradients()[:20], 1):
        for one, update in ((run, call), (expected, by_definition)):
            one.gradient.copy_(gradient)
            update.step(lr_of(t), None)
        for key, state in expected.state.items():
            if state_dtype(config, key) == "bf16":
                state.copy_(state.bfloat16())
        torch.testing.assert_close(run.weights, expected.weights, rtol=1e-6, atol=1e-7)
    skipped = {key: state.clone() for key, state in run.state.items()}
    run.gradient.fill_(torch.nan)
    call.step(PEAK, torch.ones(()))
    for key, state in run.state.items():
        assert torch.equal(state, skipped[key])
