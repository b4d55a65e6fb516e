"""The loss scale over a sequence of overflows."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_ray.config.training import LossScaleConfig, TrainingConfig
from megatron_ray.optimizer.loss_scale import LOSS_SCALE, LossScaler

CPU = torch.device("cpu")


def scaler(global_batch_size: int = 1, **fields: Any) -> LossScaler:
    training = TrainingConfig(
        seq_length=1,
        global_batch_size=global_batch_size,
        steps=1,
        precision="fp16",
        loss_scale=LossScaleConfig.model_validate(fields),
    )
    return LossScaler(training, CPU)


def overflows(seed: int, steps: int, share: float) -> list[bool]:
    drawn = random.Random(seed)
    return [drawn.random() < share for _ in range(steps)]


def scales(scaler: LossScaler, sequence: list[bool]) -> list[float]:
    """The scale of each step."""
    measured = []
    for overflow in sequence:
        measured.append(float(scaler.scale))
        scaler.update(torch.tensor(float(overflow)))
    return measured


@dataclass
class Definition:
    """The rule in plain Python."""

    config: LossScaleConfig

    def scales(self, sequence: list[bool]) -> list[float]:
        config = self.config
        scale, good, left = config.initial_scale, 0, config.hysteresis
        measured = []
        for overflow in sequence:
            measured.append(scale)
            if overflow:
                good = 0
                left -= 1
                if left <= 0:
                    scale = max(scale * config.backoff_factor, config.min_scale)
                continue
            good += 1
            if good == config.growth_interval:
                scale *= config.growth_factor
                good, left = 0, config.hysteresis
        return measured


@pytest.mark.parametrize("hysteresis", [1, 2, 5])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.6])
def test_a_dynamic_scale_follows_its_definition(hysteresis: int, share: float) -> None:
    fields: dict[str, Any] = {
        "initial_scale": 2.0**20,
        "min_scale": 3.0,
        "growth_interval": 4,
        "growth_factor": 3.0,
        "backoff_factor": 0.3,
        "hysteresis": hysteresis,
    }
    sequence = overflows(hysteresis, 400, share)
    expected = Definition(LossScaleConfig.model_validate(fields)).scales(sequence)
    assert scales(scaler(**fields), sequence) == expected
    assert len(set(expected)) > 5


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_without_hysteresis_it_is_that_of_torch(share: float) -> None:
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    judge = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=5)
    sequence = overflows(7, 300, share)
    expected = []
    for overflow in sequence:
        judge.scale(torch.zeros(()))
        expected.append(judge.get_scale())
        weight.grad = torch.full((1,), torch.inf if overflow else 1.0)
        judge.step(optimizer)
        judge.update()
    ours = scaler(
        initial_scale=2.0**16, growth_interval=5, hysteresis=1, min_scale=2.0**-64
    )
    assert scales(ours, sequence) == expected


def test_a_constant_scale_stays_and_has_no_state() -> None:
    constant = scaler(constant=1000.0)
    assert scales(constant, [True, False] * 5) == [1000.0] * 10
    assert constant.sharded_state() == {}


def test_the_state_is_live_and_continues_where_it_was() -> None:
    fields: dict[str, Any] = {"initial_scale": 2.0**20, "growth_interval": 5}
    sequence = overflows(3, 60, 0.3)
    whole = scales(scaler(**fields), sequence)
    first = scaler(**fields)
    assert scales(first, sequence[:23]) == whole[:23]
    (saved,) = first.sharded_state()[LOSS_SCALE].boxes
    again = scaler(**fields)
    (live,) = again.sharded_state()[LOSS_SCALE].boxes
    live.tensor.copy_(saved.tensor)
    assert scales(again, sequence[23:]) == whole[23:]


def test_the_scale_is_that_of_the_mean_loss_and_unscaling_rounds_nothing() -> None:
    of_sums = scaler(global_batch_size=48, constant=1024.0)
    assert float(of_sums.factor()) == 1024 / 32
    assert float(of_sums.grad_factor(of_sums.scale)) == 1024 / 32
