"""Weights that are gathered during the next forward pass are those of a plain gather, and
each layer waits for its own.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megatron_ray.data_parallel.weight_gathers import WeightGathers, wait_in_forward
from megatron_ray.sharding.boxes import Box
from megatron_ray.sharding.buckets import plan_buckets
from megatron_ray.sharding.layer_specs import ONES
from megatron_ray.sharding.parameter_types import LocalParameter, LogicalParameter, Part
from tests.support.layout_matrix import EXPERTS
from tests.support.parity import GPT2, LLAMA, RankResult, make_config, run_layout
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.parallel
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dp2": (LLAMA, {"dp": 2}),
    "pp2-dp2-tied": (GPT2, {"pp": 2, "dp": 2, "schedule": "zb-h1"}),
    "ep2-dp2": (LLAMA | {"moe": EXPERTS}, {"dp": 2, "ep": 2}),
    "tp2-cp2": (LLAMA, {"tp": 2, "cp": 2, "sequence_parallel": True}),
}


def run(model: dict[str, Any], parallel: dict[str, Any]) -> list[RankResult]:
    fields = {"dp": 1, "bucket_elements": 8000} | parallel
    config = make_config(model, fields, steps=6, precision="bf16")
    results: list[RankResult] = run_ranks(
        run_layout, config.parallel.tp * config.parallel.pp * 2, config
    )
    return results


@pytest.mark.parametrize(
    "layout",
    [
        "dp2",
        "pp2-dp2-tied",
        pytest.param("ep2-dp2", marks=pytest.mark.parity),
        pytest.param("tp2-cp2", marks=pytest.mark.parity),
    ],
)
def test_no_bit_changes(layout: str) -> None:
    model, parallel = LAYOUTS[layout]
    plain = run(model, parallel)
    overlapped = run(model, parallel | {"overlap_param_gather": True})
    for one, other in zip(plain, overlapped, strict=True):
        assert one.losses == other.losses
        assert one.grad_norms == other.grad_norms
        for (name, _, values), (same_name, _, others) in zip(
            one.weights, other.weights, strict=True
        ):
            assert name == same_name
            assert np.array_equal(values, others), name


SHAPE = (8, 8)


class Noted:
    """A gather that notes when something waits for it."""

    def __init__(self, index: int, log: list[str]) -> None:
        self.index = index
        self.log = log

    def wait(self) -> None:
        self.log.append(f"bucket {self.index}")

    def is_completed(self) -> bool:
        return False


class Layer(nn.Linear):
    """Notes its forward pass."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(*SHAPE, bias=False)
        self.name = name
        self.log = log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As a linear layer."""
        self.log.append(self.name)
        return super().forward(x)


def local(name: str) -> LocalParameter:
    logical = LogicalParameter(f"{name}.weight", SHAPE, ONES, None, decay=True)
    return LocalParameter(logical.name, SHAPE, (Part(logical, Box((0, 0), SHAPE), 0),))


def test_each_layer_waits_for_its_own_buckets_once() -> None:
    log: list[str] = []
    model = nn.ModuleDict({name: Layer(name, log) for name in ("a", "b", "c")})
    # The same weight twice, as in an embedding and a head.
    model["tied"] = Layer("tied", log)
    model["tied"].weight = model["a"].weight
    plan = plan_buckets([local(name) for name in ("a", "b", "c")], 2, 1)
    assert len(plan.buckets) == 3
    gathers = WeightGathers()
    wait_in_forward(model, plan, gathers)
    for bucket in reversed(plan.buckets):
        gathers.start(bucket, Noted(bucket.index, log))
    for name in ("tied", "b", "a", "tied"):
        model[name](torch.ones(1, 8))
    # Buckets are in the order of the backward pass.
    assert log == ["bucket 2", "tied", "bucket 1", "b", "a", "tied"]
    gathers.wait_for_all()
    gathers.wait_for_all()
    assert log[6:] == ["bucket 0"]
