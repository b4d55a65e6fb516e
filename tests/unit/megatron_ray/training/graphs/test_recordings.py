"""A recording does its work once when it is made and once in each replay, into the same
memory; what stands in for it in tests changes nothing in Python.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ray.training.graphs.recordings import (
    CudaRecording,
    HostRecording,
    record_on,
)
from tests.support.frozen_recording import FrozenRecording


class Sums:
    """Adds up an input, once in a tensor and once in Python."""

    def __init__(self) -> None:
        self.input = torch.ones(())
        self.in_place = torch.zeros(())
        self.replaced = torch.zeros(())
        self.calls = 0

    def add(self) -> Tensor:
        self.calls += 1
        self.in_place += self.input
        self.replaced = self.replaced + self.input
        return self.in_place * 10


def test_a_device_without_graphs_repeats_the_work_with_the_result_in_place() -> None:
    sums = Sums()
    recording = HostRecording(sums.add)
    assert sums.calls == 0
    results = [recording.replay() for _ in range(3)]
    assert sums.calls == 3
    assert {result.data_ptr() for result in results} == {results[0].data_ptr()}
    assert results[0] == 30


def test_the_device_decides_what_records() -> None:
    assert record_on(torch.device("cpu")) is HostRecording
    assert record_on(torch.device("cuda")) is CudaRecording


def test_replays_of_a_frozen_recording_change_tensors_only() -> None:
    sums = Sums()
    recording = FrozenRecording(partial(Sums.add, sums))
    assert sums.calls == 0
    assert recording.replay() == 10
    sums.input.fill_(5)
    first = recording.replay()
    second = recording.replay()
    assert first is second
    assert second == 110
    assert sums.in_place == 11, "in memory that the recording has"
    assert sums.replaced == 1, "only the recording itself"
    assert sums.calls == 1
    assert recording.replays == 2


def test_a_frozen_recording_reaches_objects_in_closures_and_methods() -> None:
    sums = Sums()

    def add() -> Tensor:
        return sums.add()

    for work in (sums.add, add):
        before = sums.calls
        recording = FrozenRecording(work)
        for _ in range(3):
            recording.replay()
        assert sums.calls == before + 1
    assert sums.in_place == 6


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    replays = 0
    is_freed = False

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None:
        self.is_freed = True


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of all captures, with whether garbage was collected in them."""
    seen: list[dict[str, Any]] = []

    @contextmanager
    def capture(graph: FakeGraph, **arguments: Any) -> Iterator[None]:
        seen.append(arguments | {"graph": graph, "collects": gc.isenabled()})
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return seen


def test_a_graph_is_captured_once_and_launched_by_replays(
    captures: list[dict[str, Any]],
) -> None:
    sums = Sums()
    recording = CudaRecording(sums.add)
    assert sums.calls == 1
    (capture,) = captures
    assert capture["capture_error_mode"] == "thread_local"
    assert not capture["collects"]
    assert gc.isenabled()
    first = recording.replay()
    assert recording.replay() is first
    assert capture["graph"].replays == 2
    assert sums.calls == 1
    assert not capture["graph"].is_freed
    recording.release()
    assert capture["graph"].is_freed


def test_garbage_is_collected_again_after_a_capture_that_fails(
    captures: list[dict[str, Any]],
) -> None:
    def wait() -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        CudaRecording(wait)
    assert gc.isenabled()
    gc.disable()
    try:
        CudaRecording(Sums().add)
        assert not gc.isenabled()
    finally:
        gc.enable()
