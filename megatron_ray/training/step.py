"""One optimizer step on one rank.

Owns: forward and backward over the microbatches, and reading the step's numbers late.

Must not know: schedules of learning rate or checkpoints, who listens.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.models.batch import Batch
from megatron_ray.models.forward_context import ForwardMode
from megatron_ray.parallelize.parallelize import ParallelModel
from megatron_ray.training.stages import loss_sum, run_stages


def forward_backward(
    model: ParallelModel, mesh: ParallelMesh, batches: Sequence[Batch]
) -> Tensor:
    """Sum of the losses of this replica's microbatches, zero on pipeline ranks without
    the last stage; gradients end up as sums in the main gradients, reductions under
    way.
    """
    model.begin_step()
    if model.actions:
        return loss_sum(
            run_stages(model, mesh, model.actions, batches, ForwardMode.TRAIN), mesh
        )
    total: Tensor | None = None
    for index, batch in enumerate(batches):
        model.sink.begin_microbatch(last=index == len(batches) - 1)
        loss = model.module(batch, ForwardMode.TRAIN)
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    if total is None:
        raise ValueError("a step needs at least one microbatch")
    return total


def read_later(values: Tensor) -> Callable[[], list[float]]:
    """Starts copying device scalars to the host; calling the result waits for the copy.

    On CPU there is nothing to wait for.
    """
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        values: list[float] = host.tolist()
        return values

    return read


class StepTimer:
    """Wall time of a step and its parts.

    On CUDA the parts are launch times; the whole is right once the queue is full.
    """

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._step_start = self._last
        self._parts: dict[str, float] = {}

    def mark(self, part: str) -> None:
        """Ends a part of the step."""
        now = time.perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def finish(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last `finish` and their split; starts the next step."""
        now = time.perf_counter()
        seconds = now - self._step_start
        parts = self._parts
        self._step_start = self._last = now
        self._parts = {}
        return seconds, parts

    def restart(self) -> None:
        """Leaves out what happened since the last `finish` (evaluation, saving)."""
        self._step_start = self._last = time.perf_counter()
        self._parts = {}
