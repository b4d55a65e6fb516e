"""Scales of delayed scaling, step by step, against the rule written out."""

import pytest
import torch

from megatron_ray.ops.fp8.delayed import DelayedRule, DelayedScaling
from megatron_ray.ops.fp8.quantize import E5M2
from megatron_ray.ops.fp8.recipe import Recipe

RECIPE = Recipe(E5M2, "emulated")
CPU = torch.device("cpu")
AMAXES = (2.0, 7.0, 3.0, 0.5, 0.25, 1.0)


def scaling(rule: DelayedRule) -> DelayedScaling:
    return DelayedScaling(["layers.0.mlp.up"], rule=rule, recipe=RECIPE, device=CPU)


def step(delayed: DelayedScaling, amax: float, skip: torch.Tensor | None = None) -> None:
    delayed.begin_step()
    layer = delayed.layer(0)
    layer.record("inputs", torch.tensor(amax / 4))
    layer.record("inputs", torch.tensor(amax))
    layer.record("grad", torch.tensor(amax))
    delayed.update((), skip)


@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("takes_max", [False, True])
def test_a_step_uses_the_amaxes_of_those_before(takes_max: bool, margin: int) -> None:
    delayed = scaling(DelayedRule(3, takes_max, margin))
    layer = delayed.layer(0)
    assert layer.scale("inputs") == 1
    for index, amax in enumerate(AMAXES):
        step(delayed, amax)
        used = amax
        if takes_max:
            used = max(AMAXES[max(0, index - 2) : index + 1])
        expected = torch.tensor(448.0) / torch.tensor(used) / 2**margin
        assert layer.scale("inputs") == expected
        assert layer.scale("grad") == torch.tensor(57344.0) / torch.tensor(used) / 2**margin
        # Nothing was multiplied.
        assert layer.scale("weight") == 1
    history = delayed.state()["layers.0.mlp.up/amax_history"]
    assert history.tolist() == [[1.0, 0.25, 0.5], [0.0] * 3, [1.0, 0.25, 0.5]]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_changes_no_scale(bad: float) -> None:
    delayed = scaling(DelayedRule(3))
    step(delayed, 4.0)
    step(delayed, bad)
    assert delayed.layer(0).scale("inputs") == 448 / 4
    assert delayed.state()["layers.0.mlp.up/amax_history"][0].tolist() == [4.0, 4.0, 0.0]


def test_a_skipped_step_changes_nothing() -> None:
    delayed = scaling(DelayedRule(2))
    step(delayed, 4.0, torch.tensor(0.0))
    before = {name: tensor.clone() for name, tensor in delayed.state().items()}
    step(delayed, 8.0, torch.tensor(1.0))
    for name, tensor in delayed.state().items():
        assert torch.equal(tensor, before[name])


def test_an_evaluation_changes_nothing() -> None:
    delayed = scaling(DelayedRule())
    step(delayed, 4.0)
    delayed.layer(0).record("inputs", torch.tensor(99.0))
    step(delayed, 2.0)
    assert delayed.layer(0).scale("inputs") == 448 / 2
