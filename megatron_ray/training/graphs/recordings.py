"""Records work on a device and replays it.

Owns: what a recording is on CUDA, and what stands in for it on CPU. Must not know: models,
steps, what the work is.
"""

import gc
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], Tensor]
"""Work on a device that never waits for it; the result is a tensor there."""


class Recording(Protocol):
    """Work that was recorded once."""

    def replay(self) -> Tensor:
        """Does the work; returns its result, which the next replay overwrites."""
        ...

    def release(self) -> None:
        """Frees the recording, which is not replayed again."""


Record = Callable[[Work], Recording]
"""Makes a recording of work, which is not done by that."""


class CudaRecording:
    """A CUDA graph: the kernels of the work, and the addresses of its tensors.

    Nothing that the work does in Python happens in a replay. Its temporaries have memory
    that nothing else uses while the graph exists.
    """

    def __init__(self, work: Work) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Garbage that is collected during the recording could free memory of the device,
        # which is not allowed then.
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            # Only of this thread: others may wait for the copies of a checkpoint.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = work()
        finally:
            if collects:
                gc.enable()

    def replay(self) -> Tensor:
        """Launches the graph in the current stream."""
        self._graph.replay()
        return self._result

    def release(self) -> None:
        """Frees the graph; NCCL waits for that before it closes a communicator."""
        self._graph.reset()


class HostRecording:
    """The work itself, which a replay does again, for devices that record nothing.

    As in a CUDA graph the result has the same memory in every replay.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._result: Tensor | None = None

    def replay(self) -> Tensor:
        """Does the work."""
        result = self._work()
        if self._result is None:
            self._result = result
        else:
            self._result.copy_(result)
        return self._result

    def release(self) -> None:
        """Does nothing."""


def record_on(device: torch.device) -> Record:
    """Returns what makes recordings of a device's work."""
    if device.type == "cuda":
        return CudaRecording
    return HostRecording
