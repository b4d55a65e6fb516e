"""Slots and their sink: who overwrites, when a gradient is complete, in which order."""

from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_ray.ops.weight_grad import GradSlot, WeightGradSink


def accumulate(value: float, main_grad: Tensor, *, fresh: bool) -> None:
    if fresh:
        main_grad.fill_(value)
    else:
        main_grad.add_(value)


def make_slot(ready: list[str], uses: int = 1) -> tuple[WeightGradSink, GradSlot]:
    sink = WeightGradSink(lambda slot: ready.append(slot.name))
    slot = sink.register("weight", torch.full((2,), float("nan")), uses)
    sink.begin_step()
    return sink, slot


def test_the_first_contribution_of_a_step_overwrites_and_the_last_microbatch_completes() -> (
    None
):
    ready: list[str] = []
    sink, slot = make_slot(ready, uses=2)
    for expected in (10.0, 10.0):
        sink.begin_step()
        for last in (False, True):
            sink.begin_microbatch(last=last)
            slot.contribute(partial(accumulate, 2.0))
            assert not ready
            slot.contribute(partial(accumulate, 3.0))
        assert ready == ["weight"]
        ready.clear()
        assert slot.main_grad.tolist() == [expected, expected]


def test_deferred_contributions_run_with_their_key_and_complete_then() -> None:
    ready: list[str] = []
    sink, slot = make_slot(ready)
    for key in ("a", "b"):
        sink.begin_microbatch(last=False, defer_to=key)
        assert slot.is_deferred
        slot.contribute(partial(accumulate, 1.0 if key == "a" else 10.0))
    assert slot.fresh
    sink.run_deferred("b", last=False)
    assert slot.main_grad.tolist() == [10.0, 10.0]
    assert not ready
    sink.run_deferred("a", last=True)
    assert slot.main_grad.tolist() == [11.0, 11.0]
    assert ready == ["weight"]


def test_a_wrong_order_of_calls_is_an_error() -> None:
    sink, slot = make_slot([])
    with pytest.raises(
        RuntimeError, match="weight: a gradient came before begin_microbatch"
    ):
        slot.contribute(partial(accumulate, 1.0))
    sink.begin_microbatch(last=True)
    slot.contribute(partial(accumulate, 1.0))
    with pytest.raises(RuntimeError, match="begin_step was not called"):
        slot.contribute(partial(accumulate, 1.0))
