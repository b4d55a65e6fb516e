"""When passes are recorded, what a replay reads, and what it leaves alone."""

import gc
import weakref
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.loader import StepLoader
from megatron_ray.distributed.activity import PROCESS
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.reports import StepPart
from megatron_ray.training.components import TrainingComponents
from megatron_ray.training.graphs.passes import PlainPasses, RecordedPasses
from megatron_ray.training.graphs.recordings import HostRecording, Work
from megatron_ray.training.session import batch_maker, build
from tests.support.parity import LLAMA, NoSaver, RandomDataset, make_config

MESH = ParallelMesh.single()
MTP = LLAMA | {"mtp": {"num_layers": 2}}


class Noted(HostRecording):
    """Keeps all recordings, and what the record of waits was while they were made."""

    made: ClassVar[list["Noted"]] = []

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.replays = 0
        self.on_wait = PROCESS.on_wait
        self.inputs: list[Batch] = work.args[2]  # type: ignore[attr-defined]
        self.made.append(self)

    def replay(self) -> Tensor:
        self.replays += 1
        return super().replay()


@pytest.fixture(autouse=True)
def forget() -> None:
    Noted.made.clear()


def parts(model: dict[str, Any] = LLAMA) -> tuple[TrainConfig, ParallelModel, StepLoader]:
    config = make_config(model, {"dp": 1}, steps=6)
    loader = StepLoader(
        RandomDataset(config.model.vocabulary, 32), 2, 8, 0, 1, batch_maker(config, MESH)
    )
    return config, build(config, MESH)[0], loader


def test_the_first_steps_are_plain_and_one_recording_serves_all_others() -> None:
    _, model, loader = parts()
    passes = RecordedPasses(model, MESH, 2, Noted)
    marks = list[list[StepPart]]()
    losses = list[float]()
    for step in range(5):
        of_step = list[StepPart]()
        losses.append(float(passes.run(loader.step(8 * step), of_step.append)))
        marks.append(of_step)
    (recording,) = Noted.made
    assert recording.replays == 3
    assert marks[:2] == [["forward", "backward"] * 4] * 2
    # The first replay comes after the recording, which is no part of a pass.
    assert marks[2:] == [["other", "backward"], ["backward"], ["backward"]]
    plain = PlainPasses(parts()[1], MESH)
    assert losses == [
        float(plain.run(loader.step(8 * step), lambda _: None)) for step in range(5)
    ]


def test_gradients_of_a_replay_are_those_of_its_step_alone() -> None:
    _, model, loader = parts()
    _, other, _ = parts()
    passes = RecordedPasses(model, MESH, 1, Noted)
    plain = PlainPasses(other, MESH)
    for step in range(4):
        passes.run(loader.step(8 * step), lambda _: None)
        plain.run(loader.step(8 * step), lambda _: None)
        for each in (model, other):
            each.finish_reductions()
        (gradients, expected) = (
            each.parameter_groups[0].buffers.gradients for each in (model, other)
        )
        assert torch.equal(gradients, expected)


@pytest.mark.parametrize("model", [LLAMA, MTP], ids=["llama", "mtp"])
def test_a_replay_reads_copies_of_its_microbatches(model: dict[str, Any]) -> None:
    _, parallel, loader = parts(model)
    passes = RecordedPasses(parallel, MESH, 1, Noted)
    addresses = []
    for step in range(4):
        batches = loader.step(8 * step)
        passes.run(batches, lambda _: None)
        if step == 0:
            continue
        own = Noted.made[0].inputs
        addresses.append([batch.tokens_BS.data_ptr() for batch in own])
        for copy, batch in zip(own, batches, strict=True):
            assert copy.tokens_BS.data_ptr() != batch.tokens_BS.data_ptr()
            for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids"):
                assert torch.equal(getattr(copy, name), getattr(batch, name))
            if batch.mtp_targets is not None:
                assert copy.mtp_targets is not None
                for name in ("labels_DBS", "loss_mask_DBS"):
                    targets = getattr(batch.mtp_targets, name)
                    assert torch.equal(getattr(copy.mtp_targets, name), targets)
            # Numbers of the host would be those of one step.
            assert copy.first_sample is None
            assert copy.num_tokens == 0
    assert addresses == [addresses[0]] * 3


def test_the_number_of_microbatches_and_their_shapes_are_fixed() -> None:
    _, model, loader = parts()
    passes = RecordedPasses(model, MESH, 1, Noted)
    batches = loader.step(0)
    for _ in range(2):
        passes.run(batches, lambda _: None)
    with pytest.raises(ValueError, match="zip"):
        passes.run(batches[1:], lambda _: None)
    one_row = replace(batches[0], tokens_BS=batches[0].tokens_BS[:1])
    with pytest.raises(ValueError, match=r"a tensor \(1, 32\), and .* has \(2, 32\)"):
        passes.run([one_row, *batches[1:]], lambda _: None)


def test_what_has_no_recording_is_refused() -> None:
    _, model, loader = parts()
    passes = RecordedPasses(model, MESH, 1, Noted)
    batches = loader.step(0)
    passes.run(batches, lambda _: None)
    routed = replace(batches[0], routing_replay=torch.zeros(2, 32, 2, 1))
    with pytest.raises(ValueError, match="have no recording"):
        passes.run([routed, *batches[1:]], lambda _: None)


def test_marks_of_waits_pause_while_passes_are_recorded() -> None:
    _, model, loader = parts()

    def mark(*, begins: bool) -> None:
        pass

    def fail(work: Work) -> Noted:
        assert PROCESS.on_wait is None
        raise RuntimeError("no memory")

    PROCESS.on_wait = mark
    PROCESS.microbatch = 3
    try:
        passes = RecordedPasses(model, MESH, 1, Noted)
        for step in range(2):
            passes.run(loader.step(8 * step), lambda _: None)
        assert Noted.made[0].on_wait is None
        assert PROCESS.on_wait is mark
        failing = RecordedPasses(model, MESH, 1, fail)
        failing.run(loader.step(0), lambda _: None)
        with pytest.raises(RuntimeError, match="no memory"):
            failing.run(loader.step(0), lambda _: None)
        assert PROCESS.on_wait is mark
    finally:
        PROCESS.begin()


def test_a_released_recording_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    released = list[Noted]()
    monkeypatch.setattr(Noted, "release", lambda self: released.append(self))
    _, model, loader = parts()
    passes = RecordedPasses(model, MESH, 1, Noted)
    for step in range(2):
        passes.run(loader.step(8 * step), lambda _: None)
    passes.release()
    passes.release()
    assert released == Noted.made
    recording = weakref.ref(released.pop())
    Noted.made.clear()
    gc.collect()
    assert recording() is None


def test_the_config_decides_how_passes_run() -> None:
    config, model, loader = parts()
    fields = config.model_dump(mode="json")
    fields["training"]["cuda_graph"] = {}
    graphed = TrainConfig.from_mapping(fields)
    optimizer = build(config, MESH)[1]
    kinds = []
    for each in (config, graphed):
        made: Any = TrainingComponents(
            each, MESH, model, optimizer, loader, None, NoSaver()
        )
        kinds.append(type(made.passes))
    assert kinds == [PlainPasses, RecordedPasses]
    assert graphed.training.cuda_graph is not None
    assert graphed.training.cuda_graph.warmup_steps == 3
