"""A bf16 weight and its remainder are an fp32 number, whatever its bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ray.config.optimizer import OptimizerConfig
from megatron_ray.optimizer.partition import Run, chunks
from megatron_ray.optimizer.state_memory.main_parameters import (
    Remainders,
    joined,
    main_parameters,
    split,
)
from megatron_ray.optimizer.update_rule import UpdateRule

UPPER = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F]
UPPER += [half | 0x8000 for half in UPPER]
RULE = UpdateRule(0.0)


def all_numbers() -> np.ndarray:
    """Every lower half of some upper halves: subnormal, normal and the largest numbers."""
    upper = np.array(UPPER, dtype=np.uint32)[:, None] << 16
    numbers: np.ndarray = (upper | np.arange(1 << 16, dtype=np.uint32)).reshape(-1)
    return numbers


def test_every_number_is_restored_bit_for_bit() -> None:
    bits = all_numbers()
    values = torch.from_numpy(bits.view(np.float32))
    weights, remainders = split(values)
    assert (weights.dtype, remainders.dtype) == (torch.bfloat16, torch.int16)
    restored = joined(weights, remainders).numpy().view(np.uint32)
    assert np.array_equal(restored, bits)


def test_weights_are_rounded_to_the_nearest_and_ties_away_from_zero() -> None:
    bits = all_numbers()
    weights = split(torch.from_numpy(bits.view(np.float32)))[0]
    rounded = weights.view(torch.int16).numpy().view(np.uint16)
    # Of the magnitude, the carry of the lower half's highest bit.
    assert np.array_equal(rounded, ((bits.astype(np.uint64) + 0x8000) >> 16) & 0xFFFF)
    nearest = torch.from_numpy(bits.view(np.float32)).to(torch.bfloat16)
    others = nearest.view(torch.int16).numpy().view(np.uint16) != rounded
    is_tie = (bits & 0xFFFF) == 0x8000
    is_even = (bits >> 16) & 1 == 0
    assert np.array_equal(others, is_tie & is_even), "as torch rounds all others"


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), -0.0])
def test_what_is_no_finite_number_stays_it(value: float) -> None:
    values = torch.tensor([value])
    weights, remainders = split(values)
    assert torch.equal(weights.float().nan_to_num(7.0), values.nan_to_num(7.0))
    assert torch.equal(
        joined(weights, remainders).view(torch.int32), values.view(torch.int32)
    )


def test_chunks_are_consecutive_parts_of_each_run() -> None:
    run = Run(10, 35, 100, RULE, tp_sharded=False, state_start=7)
    (short, *_), (rest,) = (list(chunks([run], most)) for most in (10, 25))
    assert (short.start, short.end, short.shard_start, short.state_start) == (
        10,
        20,
        100,
        7,
    )
    assert rest == run
    (*_, last) = chunks([run], 10)
    assert last == replace(run, start=30, shard_start=120, state_start=27)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"store_param_remainders": True},
        {"offload": True},
        {"store_param_remainders": True, "offload": True},
    ],
    ids=["plain", "remainders", "offload", "both"],
)
def test_what_is_loaded_through_views_is_published(fields: dict[str, bool]) -> None:
    torch.manual_seed(0)
    values = torch.randn(20)
    weights = torch.zeros(24, dtype=torch.bfloat16)
    run = Run(4, 24, 0, RULE, tp_sharded=False)
    config = OptimizerConfig.model_validate({"lr": 0.1, **fields})
    main = main_parameters(config, weights, 20)
    assert main.kept is not None
    assert main.kept.nbytes == (40 if "store_param_remainders" in fields else 80)
    main.begin_load()
    main.view(run).copy_(values)
    main.publish([run])
    assert torch.equal(main.load(run), values)
    assert torch.equal(main.view(run), values)
    assert torch.equal(weights, torch.cat([torch.zeros(4), values]).bfloat16())
    main.store(run, values * 2)
    main.publish([run])
    assert torch.equal(main.load(run), values * 2)
    assert torch.equal(weights[4:], (values * 2).bfloat16())


def test_a_copy_for_a_checkpoint_does_not_change_with_the_weights() -> None:
    weights = torch.zeros(8, dtype=torch.bfloat16)
    main = Remainders(weights, 8, offload=False)
    run = Run(0, 8, 0, RULE, tp_sharded=False)
    copy = main.view(run)
    main.store(run, torch.ones(8))
    assert copy.tolist() == [0.0] * 8
