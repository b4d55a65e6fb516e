"""Muon against its definition in float64, by singular values instead of products."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_ray.config.optimizer import MuonConfig, OptimizerConfig
from megatron_ray.optimizer.matrices.update import LocalMatrix, MatrixUpdate, Segment
from megatron_ray.optimizer.rules.muon import COEFFICIENTS, newton_schulz
from megatron_ray.optimizer.update_calls import RunTensors
from megatron_ray.optimizer.update_rule import UpdateRule
from megatron_ray.sharding.layer_specs import ReplicatedSpec, ShardPosition
from megatron_ray.sharding.matrices import OwnedMatrix, matrices_of
from megatron_ray.sharding.parameter_types import Init

Array = npt.NDArray[np.float64]
STEPS = 100
PEAK = 0.02
CPU = torch.device("cpu")


def lr_of(step: int) -> float:
    return PEAK * (1 - 0.5 * step / STEPS)


def muon_config(**fields: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"name": "muon", "lr": PEAK, **fields})


def make(
    config: OptimizerConfig, shape: tuple[int, int]
) -> tuple[RunTensors, MatrixUpdate]:
    """One float64 matrix on one rank, in two segments."""
    rows, columns = shape
    (tensor,) = ReplicatedSpec(columns, rows, Init("zeros")).parameters(
        "layer", ShardPosition()
    )
    assert config.muon is not None
    (matrix,) = matrices_of(tensor, config.muon)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(rows * columns, dtype=torch.float64, generator=generator)
    run = RunTensors(weights, torch.zeros_like(weights), {})
    if config.momentum:
        run = replace(run, state={"momentum_buffer": torch.zeros_like(weights)})
    rule = replace(UpdateRule.of(config), of_matrix=True)
    segments = []
    for part in (slice(0, 7), slice(7, None)):
        state = {name: flat[part] for name, flat in run.state.items()}
        tensors = RunTensors(run.weights[part], run.gradient[part], state)
        segments.append(Segment(rule, tensors))
    owned = OwnedMatrix(matrix, 0, rows * columns, 0)
    local = LocalMatrix(owned, tuple(segments))
    update = MatrixUpdate(config.muon, [[local]], None, None, config.lr, CPU)
    return run, update


def gradients(size: int, steps: int = STEPS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(steps, size, dtype=torch.float64, generator=generator)


def orthogonalized(matrix: Array, muon: MuonConfig) -> Array:
    """The polynomials of the paper, on singular values."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(matrix)
    coefficients = COEFFICIENTS[muon.coefficients]
    for index in range(muon.steps):
        a, b, c = coefficients[index % len(coefficients)]
        values = a * values + b * values**3 + c * values**5
    result: Array = (left * values) @ right
    return result


SCALES = {
    "spectral": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "unit_rms_norm": lambda rows, columns: (rows / columns) ** 0.5,
    "shape_scaling": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
}


@pytest.mark.parametrize("shape", [(8, 13), (21, 6)])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"nesterov": False, "decay": "lr", "weight_decay": 0.1},
        {"decay": "schedule", "weight_decay": 0.1, "muon": {"coefficients": "simple"}},
        {"decay": "l2", "weight_decay": 0.1, "muon": {"scale": "unit_rms_norm"}},
        {"momentum": 0.0, "muon": {"scale": "shape_scaling", "steps": 3}},
    ],
)
def test_updates_equal_the_definition(
    fields: dict[str, Any], shape: tuple[int, int]
) -> None:
    config = muon_config(**fields)
    assert config.muon is not None
    assert config.momentum is not None
    run, update = make(config, shape)
    expected = run.weights.numpy().reshape(shape).copy()
    buffer = np.zeros(shape)
    shares = {"lr": 1.0, "schedule": 1 / PEAK, "l2": 0.0}
    for t, gradient in enumerate(gradients(shape[0] * shape[1]), 1):
        run.gradient.copy_(gradient)
        update.step(lr_of(t), None)
        g = gradient.numpy().reshape(shape)
        if config.decay == "l2":
            g = g + config.weight_decay * expected
        buffer = config.momentum * buffer + g
        direction = g + config.momentum * buffer if config.nesterov else buffer
        moved = orthogonalized(direction, config.muon) * SCALES[config.muon.scale](*shape)
        decay = lr_of(t) * shares[config.decay or "lr"] * config.weight_decay
        expected = expected - decay * expected - lr_of(t) * moved
        np.testing.assert_allclose(
            run.weights.numpy().reshape(shape), expected, rtol=1e-6, atol=1e-9
        )
        for moment in run.state.values():
            np.testing.assert_allclose(moment.numpy().reshape(shape), buffer, rtol=1e-6)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_singular_values_come_close_to_one(coefficients: Any, precision: Any) -> None:
    muon = MuonConfig(coefficients=coefficients, precision=precision)
    matrix = torch.randn(32, 96, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(newton_schulz(matrix * 1e-4, muon))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_matrix_without_gradient_stays() -> None:
    assert torch.equal(newton_schulz(torch.zeros(3, 5), MuonConfig()), torch.zeros(3, 5))


def test_a_skipped_step_changes_nothing() -> None:
    config = muon_config(weight_decay=0.1)
    run, update = make(config, (6, 4))
    other, undisturbed = make(config, (6, 4))
    for t, gradient in enumerate(gradients(24, 6), 1):
        for one, call in ((run, update), (other, undisturbed)):
            one.gradient.copy_(gradient)
            call.step(lr_of(t), torch.zeros(()))
        before = (run.weights.clone(), run.state["momentum_buffer"].clone())
        run.gradient.fill_(torch.nan)
        update.step(lr_of(t), torch.ones(()))
        assert torch.equal(run.weights, before[0])
        assert torch.equal(run.state["momentum_buffer"], before[1])
    assert torch.equal(run.weights, other.weights)
