"""Optimizers by name: defaults, refusals, and those of installed packages."""

from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_ray.config import optimizer_kinds
from megatron_ray.config.optimizer import OPTIONAL_NUMBERS, MuonConfig, OptimizerConfig
from megatron_ray.config.optimizer_kinds import (
    BUILT_IN,
    OptimizerKind,
    state_bytes,
)

LION = OptimizerKind("lion:lion", lambda config: ("exp_avg",), {"beta1": 0.9})
SAME = {"beta": 0.9, "weight": 0.6}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_optimizer_has_its_own_defaults(name: str) -> None:
    config = OptimizerConfig(name=name, lr=0.1)
    chosen = config.model_dump(include=set(OPTIONAL_NUMBERS), exclude_none=True)
    assert chosen.keys() == BUILT_IN[name].numbers.keys()
    assert OptimizerConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("fields", "num_states"),
    [
        ({}, 2),
        ({"name": "sgd"}, 1),
        ({"name": "sgd", "momentum": 0}, 0),
        ({"name": "aggmo_adopt"}, 2),
        ({"name": "aggmo_adamw", "aggregated": [{"beta": 0.9, "weight": 0.3}] * 3}, 4),
    ],
)
def test_the_state_depends_on_the_numbers(fields: dict[str, Any], num_states: int) -> None:
    config = OptimizerConfig(lr=0.1, **fields)
    assert state_bytes(config, of_matrix=False) == 4 * num_states
    assert state_bytes(config, of_matrix=True) == 4 * num_states


@pytest.mark.parametrize(("momentum", "num_states"), [(None, 1), (0.5, 1), (0.0, 0)])
def test_matrices_of_muon_have_one_moment(momentum: float | None, num_states: int) -> None:
    config = OptimizerConfig(name="muon", lr=0.1, momentum=momentum)
    assert state_bytes(config, of_matrix=True) == 4 * num_states
    assert state_bytes(config, of_matrix=False) == 8


def test_the_scale_factor_follows_from_the_scale() -> None:
    assert MuonConfig().factor(30, 100) == pytest.approx(2.0)
    assert MuonConfig(scale_factor=1.0).factor(100, 30) == pytest.approx(10.0)
    assert MuonConfig(scale="unit_rms_norm").factor(25, 100) == pytest.approx(0.5)
    assert MuonConfig(scale="shape_scaling").factor(25, 100) == pytest.approx(1.0)
    halved = MuonConfig(scale="shape_scaling", scale_factor=0.5)
    assert halved.factor(400, 100) == pytest.approx(1.0)


def test_state_of_matrices_needs_the_numbers_of_their_update() -> None:
    with pytest.raises(ValueError, match="needs the numbers momentum and muon"):
        OptimizerKind("lion:lion", lambda config: (), matrix_state=lambda config: ())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "adpot"}, "there is no optimizer 'adpot'; did you mean 'adopt'?"),
        ({"name": "x"}, "there is no optimizer 'x'; known: adamw, adopt"),
        ({"nu": 0.5}, "adamw does not use nu; leave it out"),
        ({"name": "sgd", "beta1": 0.9}, "sgd does not use beta1; leave it out"),
        ({"muon": {"steps": 3}}, "adamw does not use muon; leave it out"),
        ({"adamw_lr_scale": 2}, "adamw does not use adamw_lr_scale; leave it out"),
        ({"name": "muon", "nu": 0.5}, "muon does not use nu; leave it out"),
        ({"name": "muon", "muon": {"steps": 0}}, "greater than or equal to 1"),
        (
            {"name": "aggmo_adamw", "aggregated": [SAME, SAME]},
            "the weights of aggregated add up to 1.2; make it at most 1",
        ),
    ],
)
def test_what_an_optimizer_has_not_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        OptimizerConfig(lr=0.1, **fields)
    assert words in str(caught.value)


def test_an_installed_package_adds_an_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    group = optimizer_kinds.ENTRY_POINTS
    installed = EntryPoints(
        [
            EntryPoint("lion", f"{__name__}:LION", group),
            EntryPoint("tiger", f"{__name__}:SAME", group),
        ]
    )
    monkeypatch.setattr(optimizer_kinds, "entry_points", lambda group: installed)
    monkeypatch.setattr(EntryPoint, "load", lambda self: globals()[self.attr])
    config = OptimizerConfig(name="lion", lr=0.1)
    assert config.beta1 == 0.9
    assert state_bytes(config, of_matrix=True) == 4
    with pytest.raises(ValidationError, match=r"of optimizer 'tiger' is no OptimizerKind"):
        OptimizerConfig(name="tiger", lr=0.1)
