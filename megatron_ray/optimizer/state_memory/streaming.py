"""Brings runs to the device for their update, and takes them back.

Must not know: the arithmetic of an update.

Every update is computed on the device, by the same kernels as without it, so that the
weights are the same to the bit and every optimizer works. The copies are queued on the
current stream, in whose order host memory is written and read again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from megatron_ray.optimizer.partition import Run
from megatron_ray.optimizer.state_memory.main_parameters import MainParameters, to_device
from megatron_ray.optimizer.update_calls import RunTensors


@dataclass(frozen=True)
class StreamedRun:
    """A run whose main parameters or state are not kept as an update needs them."""

    run: Run
    main: MainParameters
    gradient: Tensor
    state: Mapping[str, Tensor]
    """Views of what is kept, by name."""
    offload: bool
    """Whether that is in host memory."""

    @contextmanager
    def opened(self) -> Iterator[RunTensors]:
        """Gives the run's tensors on the device; what becomes of them is kept."""
        weights = self.main.load(self.run)
        state = dict(self.state)
        if self.offload:
            device = self.gradient.device
            state = {name: to_device(kept, device) for name, kept in self.state.items()}
        yield RunTensors(weights, self.gradient, state)
        self.main.store(self.run, weights)
        if self.offload:
            for name, kept in self.state.items():
                kept.copy_(state[name], non_blocking=True)
