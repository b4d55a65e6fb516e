"""When copies of a rank's state are due; tests/parallel/test_peer_copies.py makes them."""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import pytest
import torch

from megatron_ray.commands import Command, all_sent, strongest_voted, votes_for
from megatron_ray.config.training import TrainingConfig
from megatron_ray.ops.fp8.delayed import DelayedRule, DelayedScaling
from megatron_ray.ops.fp8.quantize import E5M2
from megatron_ray.ops.fp8.recipe import Recipe
from megatron_ray.optimizer.loss_scale import LossScaler
from megatron_ray.sharding.sharded_state import ShardedState
from megatron_ray.training.progress import Progress
from megatron_ray.training.reporting.step_numbers import HostNumbers, StepNumbers
from megatron_ray.training.reporting.step_timer import StepTimes
from megatron_ray.training.saving import TrainingSaver, training_state
from megatron_ray.training.state_copy import StateCopier, StateCopy, load_copy


class Saver:
    """A rank without a tensor."""

    published: ClassVar[dict[str, bytes]] = {}

    def complete_state(self) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def train_state(self, progress: Progress) -> dict[str, Any]:
        return {"step": progress.step}


class Store:
    """Keeps nothing but the steps."""

    restored = None
    is_sending = False

    def __init__(self) -> None:
        self.steps: list[int] = []

    def reserve(self, num_bytes: int, allocate: Callable[[int], torch.Tensor]) -> None:
        self.memory = allocate(num_bytes)

    def next_memory(self) -> torch.Tensor:
        return self.memory

    def keep(self, copy: StateCopy, wait: Callable[[], None]) -> None:
        wait()
        self.steps.append(copy.step)


def copier(store: Store, every_steps: int, start: int = 0) -> StateCopier:
    saver = cast(TrainingSaver, Saver())
    return StateCopier(every_steps, saver, store, torch.device("cpu"), Progress(step=start))


def numbers(step: int, *, sent: bool) -> StepNumbers:
    host = HostNumbers(Progress(step=step), 0.1, StepTimes(0.1, {}), 0)
    return StepNumbers(host, 1.0, 1.0, 1.0, (), Command.CONTINUE, sent)


def run(
    copier: StateCopier, steps: range, sent: Callable[[int], bool], lag: int = 0
) -> None:
    """The boundaries of steps; votes arrive `lag` steps later."""
    for step in steps:
        if step - lag in steps:
            copier.observe([numbers(step - lag, sent=sent(step - lag))])
        if copier.is_due(Progress(step=step)):
            copier.copy(Progress(step=step))


@pytest.mark.parametrize(
    ("every_steps", "lag", "copies"),
    [(3, 0, [3, 6, 9]), (3, 1, [3, 6, 9]), (1, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])],
)
def test_copies_are_made_every_few_steps(
    every_steps: int, lag: int, copies: list[int]
) -> None:
    store = Store()
    run(copier(store, every_steps), range(1, 11), lambda step: True, lag)
    assert store.steps == copies


def test_a_copy_waits_until_the_last_one_has_arrived_everywhere() -> None:
    store = Store()
    # The copy of step 3 takes until after step 8.
    run(copier(store, 3), range(1, 15), lambda step: not 3 < step < 9)
    assert store.steps == [3, 9, 12]


def test_votes_from_before_a_copy_are_not_about_it() -> None:
    store = Store()
    made = copier(store, 1)
    made.observe([numbers(1, sent=True)])
    made.copy(Progress(step=1))
    made.observe([numbers(1, sent=True)])
    assert not made.is_due(Progress(step=2))


def test_a_run_that_continues_from_a_copy_sends_it_first() -> None:
    store = Store()
    run(copier(store, 3, start=37), range(38, 50), lambda step: step > 41)
    assert store.steps == [42, 45, 48]


def test_a_vote_on_copies_leaves_commands_as_they_are() -> None:
    sending = votes_for(Command.CONTINUE, is_sending=True)
    stopping = votes_for(Command.STOP)
    counts = [one + other for one, other in zip(sending, stopping, strict=True)]
    assert strongest_voted(counts) is Command.STOP
    assert not all_sent(counts)
    assert all_sent(stopping)


class KeepingStore(Store):
    """Keeps the last copy."""

    copy: StateCopy

    def keep(self, copy: StateCopy, wait: Callable[[], None]) -> None:
        super().keep(copy, wait)
        self.copy = copy


class Optimizer:
    """Nothing but the state of a loss scale."""

    group_sync = None

    def __init__(self) -> None:
        training = TrainingConfig(
            seq_length=1, global_batch_size=1, steps=1, precision="fp16"
        )
        self.scaler = LossScaler(training, torch.device("cpu"))

    def sharded_state(self) -> ShardedState:
        return self.scaler.sharded_state()

    def begin_load(self) -> None:
        pass

    def set_steps_taken(self, steps: int) -> None:
        pass

    def publish(self) -> None:
        pass


def test_a_copy_has_the_loss_scale() -> None:
    optimizer = Optimizer()
    saver: Any = Saver()
    saver.state = optimizer.sharded_state
    saver.train_state = lambda progress: {
        "step": progress.step,
        "consumed_samples": 0,
        "planned_samples": [8],
    }
    store = KeepingStore()
    made = StateCopier(3, saver, store, torch.device("cpu"), Progress())
    for _ in range(4):
        optimizer.scaler.update(torch.ones(()))
    made.copy(Progress(step=4))
    again: Any = Optimizer()
    model: Any = type("Model", (), {"expert_biases": {}, "delayed_scaling": None})()
    assert load_copy(store.copy, model, again, {}).step == 4
    assert float(again.scaler.scale) == float(optimizer.scaler.scale) == 2.0**29


def test_a_copy_has_the_scales_of_fp8() -> None:
    def model() -> Any:
        recipe = Recipe(E5M2, "emulated")
        device = torch.device("cpu")
        scaling = DelayedScaling(["layers.0.mlp.up"], recipe, DelayedRule(3), device)
        return type("Model", (), {"expert_biases": {}, "delayed_scaling": scaling})()

    optimizer: Any = Optimizer()
    here = model()
    saver: Any = Saver()
    saver.state = lambda: training_state(here, optimizer)
    saver.train_state = lambda progress: {
        "step": progress.step,
        "consumed_samples": 0,
        "planned_samples": [8],
    }
    store = KeepingStore()
    made = StateCopier(3, saver, store, torch.device("cpu"), Progress())
    for amax in (3.0, 5.0):
        here.delayed_scaling.begin_step()
        here.delayed_scaling.layer(0).record("grad", torch.tensor(amax))
        here.delayed_scaling.update(())
    made.copy(Progress(step=4))
    again = model()
    load_copy(store.copy, again, optimizer, {})
    state = again.delayed_scaling.state()
    assert again.delayed_scaling.layer(0).scale("grad") == torch.tensor(57344.0) / 5
    assert state["layers.0.mlp.up/amax_history"][2].tolist() == [5.0, 3.0, 0.0]


def test_a_copy_of_another_layout_is_not_loaded() -> None:
    copy = StateCopy(5, memoryview(b""), "other", {}, {})
    model: Any = type("Model", (), {"expert_biases": {}, "delayed_scaling": None})()
    optimizer: Any = Optimizer()
    optimizer.sharded_state = dict
    with pytest.raises(ValueError, match="the copy of step 5 has another layout"):
        load_copy(copy, model, optimizer, {})
