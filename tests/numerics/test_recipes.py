"""Losses and norms of whole recipes: those that were recorded, to the bit; and every layout's."""

from typing import Any

import numpy as np
import pytest

from megatron_ray.validation.resolution import world_size
from tests.support import parity
from tests.support.ranks import run_ranks
from tests.support.recipes import (
    NAMES,
    golden,
    processor,
    read_recipe,
    recipe_config,
    trained,
)

CASES = [(name, layout) for name in NAMES for layout in read_recipe(name)["layouts"]]


def as_floats(numbers: list[str]) -> list[float]:
    return [float.fromhex(number) for number in numbers]


def test_recorded_losses_and_norms_are_computed_exactly() -> None:
    assert len(NAMES) >= 12
    computed = trained(NAMES)
    for name in NAMES:
        recorded = golden(name)
        for kind, numbers in computed[name].items():
            if processor() in recorded["processors"]:
                assert numbers == recorded[kind], (name, kind)
                continue
            # A kind of processor on which nothing was recorded may round otherwise.
            rtol = 1e-5 if name.endswith("fp32") else 1e-2
            expected = as_floats(recorded[kind])
            np.testing.assert_allclose(as_floats(numbers), expected, rtol, err_msg=name)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_layouts_have_the_losses_of_one_rank(name: str, layout: str) -> None:
    parallel: dict[str, Any] = read_recipe(name)["layouts"][layout]
    config = recipe_config(name, parallel)
    num_ranks = world_size(config)
    recorded = golden(name)
    # bf16 rounds sums of tokens that ranks add up in another order.
    rtol = 1e-5 if name.endswith("fp32") else 1e-2
    for rank in run_ranks(parity.run_layout, num_ranks, config, timeout_s=180):
        np.testing.assert_allclose(rank.losses, as_floats(recorded["loss"]), rtol)
        norms = as_floats(recorded["grad_norm"])
        np.testing.assert_allclose(rank.grad_norms, norms, 10 * rtol)
