"""Runs the passes of a step: kernel by kernel, or replayed from a recording.

Owns: when they are recorded, and the memory that a recording reads its microbatches from.
Must not know: how a device records, what follows the passes.

A replay changes tensors only: gradients in the flat buffers, counts and largest values in
the layers' own tensors, the sum of the losses. What follows the passes reads those, and
nothing that the passes leave in Python.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import Tensor

from megatron_ray.distributed.activity import PROCESS
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch, MTPTargets
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.reports import StepPart
from megatron_ray.training.graphs.recordings import Record, Recording, record_on
from megatron_ray.training.step import forward_backward

Mark = Callable[[StepPart], None]


class Passes(Protocol):
    """Runs the forward and backward passes of steps."""

    def run(self, batches: Sequence[Batch], mark: Mark) -> Tensor:
        """Does what `training.step.forward_backward` does."""
        ...

    def release(self) -> None:
        """Frees what is kept from step to step, after the last one."""


class PlainPasses:
    """Launches every kernel of every step."""

    def __init__(self, model: ParallelModel, mesh: ParallelMesh) -> None:
        self._model = model
        self._mesh = mesh

    def run(self, batches: Sequence[Batch], mark: Mark) -> Tensor:
        """Runs the passes."""
        return forward_backward(self._model, self._mesh, batches, mark)

    def release(self) -> None:
        """Does nothing."""


class RecordedPasses:
    """Launches every kernel of the first `warmup_steps` steps; replays the others.

    Every step must have as many microbatches, of the same shapes. `record` makes the
    recording, by default that of the device.
    """

    def __init__(
        self,
        model: ParallelModel,
        mesh: ParallelMesh,
        warmup_steps: int,
        record: Record | None = None,
    ) -> None:
        self._model = model
        self._mesh = mesh
        self._num_plain = warmup_steps
        """Steps before the passes are recorded."""
        self._record = record or record_on(mesh.device)
        self._inputs: list[Batch] = []
        """The microbatches that a replay reads."""
        self._recording: Recording | None = None

    def run(self, batches: Sequence[Batch], mark: Mark) -> Tensor:
        """Runs or replays the passes; the next replay overwrites the result.

        The time of a replay cannot be split, and counts as `backward`.
        """
        if self._num_plain > 0:
            self._num_plain -= 1
            return forward_backward(self._model, self._mesh, batches, mark)
        if self._recording is None:
            self._inputs = [_own_copy(batch) for batch in batches]
            self._recording = self._make_recording()
            mark("other")
        else:
            _fill(self._inputs, batches)
        PROCESS.microbatch = None
        loss_sum = self._recording.replay()
        mark("backward")
        return loss_sum

    def release(self) -> None:
        """Frees the recording, which must not outlive the communicators in it."""
        if self._recording is not None:
            self._recording.release()
        self._recording = None
        self._inputs = []

    def _make_recording(self) -> Recording:
        # Marks in the stream would become part of the recording, and could not be read.
        on_wait = PROCESS.on_wait
        PROCESS.on_wait = None
        try:
            return self._record(partial(_run, self._model, self._mesh, self._inputs))
        finally:
            PROCESS.on_wait = on_wait


def _run(model: ParallelModel, mesh: ParallelMesh, batches: Sequence[Batch]) -> Tensor:
    loss_sum = forward_backward(model, mesh, batches)
    # A recording must contain the ends of all collectives that start in it.
    model.finish_reductions()
    return loss_sum


def _own_copy(batch: Batch) -> Batch:
    """Returns a batch with the same tensors in memory of its own.

    What only the host knows of a microbatch would stay that of the first one, and is left
    out. Raises ValueError for a batch of which the passes read such numbers.
    """
    if batch.packed is not None or batch.routing_replay is not None:
        raise ValueError(
            "passes over packed documents or with given routes have no recording"
        )
    mtp_targets = None
    if batch.mtp_targets is not None:
        mtp_targets = MTPTargets(
            batch.mtp_targets.labels_DBS.clone(), batch.mtp_targets.loss_mask_DBS.clone()
        )
    return replace(
        batch,
        tokens_BS=batch.tokens_BS.clone(),
        labels_BS=batch.labels_BS.clone(),
        loss_mask_BS=batch.loss_mask_BS.clone(),
        position_ids=batch.position_ids.clone(),
        num_tokens=0,
        mtp_targets=mtp_targets,
        first_sample=None,
    )


def _fill(inputs: Sequence[Batch], batches: Sequence[Batch]) -> None:
    """Copies microbatches to those that a recording reads.

    Raises ValueError for another number of them, and for other shapes.
    """
    for own, batch in zip(inputs, batches, strict=True):
        for target, source in zip(_tensors(own), _tensors(batch), strict=True):
            # copy_ alone would repeat a single row.
            if target.shape != source.shape:
                raise ValueError(
                    f"a microbatch has a tensor {tuple(source.shape)}, and the recorded one "
                    f"has {tuple(target.shape)}"
                )
            target.copy_(source)


def _tensors(batch: Batch) -> list[Tensor]:
    tensors = [batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS, batch.position_ids]
    if batch.mtp_targets is not None:
        tensors += [batch.mtp_targets.labels_DBS, batch.mtp_targets.loss_mask_DBS]
    return tensors
